"""Checkpoints in the bucket: files, then a manifest of their hashes, then a commit marker.

A checkpoint counts once `COMMITTED` exists and every hash verifies; until then it is invisible.
Each attempt to write one has a directory of its own, so two writers never mix their files.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from heliostat.errors import HeliostatError
from heliostat.storage import Missing, Store


class Corrupt(HeliostatError):
    """A committed checkpoint does not hold what was committed."""


_DIRECTORY = re.compile(r"(?P<step>\d{8})-[0-9a-f]{8}")
_MANIFEST, _COMMITTED = "manifest.json", "COMMITTED"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose every file was read and verified."""

    key: str
    step: int
    files: Mapping[str, bytes]


def save(store: Store, run: str, step: int, files: Mapping[str, bytes]) -> str:
    """Write `files` as the checkpoint of `step` and commit it; returns its key.

    Raises:
        HeliostatError: the bucket cannot be written; nothing is committed then.
    """
    key = f"{_prefix(run)}{step:08d}-{secrets.token_hex(4)}"
    for name, data in files.items():
        store.write(f"{key}/{name}", data)
    listing = {
        name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in sorted(files.items())
    }
    manifest = json.dumps({"step": step, "files": listing}, indent=1).encode()
    store.write(f"{key}/{_MANIFEST}", manifest)
    store.create(f"{key}/{_COMMITTED}", _sha256(manifest).encode())
    return key


def load_newest(
    store: Store, run: str, warn: Callable[[str], None] = lambda _: None
) -> Checkpoint | None:
    """The committed checkpoint with the highest step that verifies, or None.

    One that does not verify is passed over for the one before; `warn` gets a sentence why.
    """
    for key in committed(store, run):
        try:
            return load(store, key)
        except Corrupt as error:
            warn(f"passing over checkpoint {key}: {error}")
    return None


def load(store: Store, key: str) -> Checkpoint:
    """The committed checkpoint at `key`, every file verified.

    Raises:
        Corrupt: a file is missing or is not the one that was committed.
    """
    manifest = _read(store, f"{key}/{_MANIFEST}")
    if _sha256(manifest).encode() != _read(store, f"{key}/{_COMMITTED}"):
        raise Corrupt(f"{_MANIFEST} is not the one that was committed")
    document: dict[str, Any] = json.loads(manifest)
    files = {
        name: _verified(store, f"{key}/{name}", told) for name, told in document["files"].items()
    }
    return Checkpoint(key, document["step"], files)


def committed(store: Store, run: str) -> list[str]:
    """Keys of the committed checkpoints of `run`, the newest first."""
    return [key for key, done in _directories(store, run) if done]


def retain(store: Store, run: str, keep: int) -> None:
    """Delete all but the `keep` newest committed checkpoints, and leftovers older than those.

    The marker goes first, so a deletion that is interrupted leaves nothing half-visible.
    """
    directories = list(_directories(store, run))
    kept = [key for key, done in directories if done][:keep]
    if not kept:
        return
    for key, _ in directories:
        if key not in kept and _step(key) <= _step(kept[0]):
            store.delete(f"{key}/{_COMMITTED}")
            for entry in list(store.list(f"{key}/")):
                store.delete(entry.key)


def _directories(store: Store, run: str) -> Iterator[tuple[str, bool]]:
    """(key, committed) of every checkpoint directory of `run`, the highest step first."""
    done: dict[str, bool] = {}
    for entry in store.list(_prefix(run)):
        key, _, name = entry.key.rpartition("/")
        if _DIRECTORY.fullmatch(key.rpartition("/")[2]):
            done[key] = done.get(key, False) or name == _COMMITTED
    yield from sorted(done.items(), reverse=True)


def _verified(store: Store, key: str, told: Mapping[str, Any]) -> bytes:
    data = _read(store, key)
    if len(data) != told["bytes"]:
        raise Corrupt(f"{key} has {len(data)} bytes instead of {told['bytes']}")
    if _sha256(data) != told["sha256"]:
        raise Corrupt(f"{key} does not match its SHA-256")
    return data


def _read(store: Store, key: str) -> bytes:
    try:
        return store.read(key)
    except Missing as error:
        raise Corrupt(f"{key} is missing") from error


def _prefix(run: str) -> str:
    return f"runs/{run}/checkpoints/"


def _step(key: str) -> int:
    return int(key.rpartition("/")[2].partition("-")[0])


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
