"""Checkpoints in the bucket: files, then a manifest of what they hold, then a commit marker.

A checkpoint counts once `COMMITTED` exists and names the hash of its manifest, which has the hash
of every piece of every tensor; until then it is invisible. Each attempt to write one has a
directory of its own, so two writers never mix their files.
"""

import json
import math
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from heliostat.errors import HeliostatError
from heliostat.storage import Missing, Store
from heliostat.storage.documents import Damaged, read_document
from heliostat.train.span import Span, hash_bytes

Best = Literal["lower", "higher"]

FORMAT = 1
_DIRECTORY = re.compile(r"(?P<step>\d{8})-\d{6}-[0-9a-f]{8}")
_MANIFEST, _COMMITTED, _SCORE = "manifest.json", "COMMITTED", "score.json"
MAX_UNSCORED = 8
MAX_FENCE = 999_999  # six digits in the name of a directory


class Corrupt(HeliostatError):
    """A committed checkpoint does not hold what was committed."""


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: where it begins in the tensor, its shape, and its bytes in a file."""

    at: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    span: Span


@dataclass(frozen=True)
class File:
    """A file of `size` bytes: those of its header, then those of pieces without a gap."""

    size: int
    header: Span


@dataclass(frozen=True)
class Stored:
    """A tensor in a checkpoint: its type in the words of safetensors, and its pieces."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds; `extra` is whatever JSON the run keeps.

    `metric` is what retention ranks by. `fence` is the number of the writer, see `lease`.
    """

    step: int
    fence: int
    metric: float | None
    extra: Mapping[str, Any]
    files: Mapping[str, File]
    tensors: Mapping[str, Stored]


@dataclass(frozen=True)
class Found:
    """An attempt to write a checkpoint, as retention sees it.

    `scored` says that its metric came after its commit, see `record_score`.
    """

    key: str
    step: int
    committed: bool
    metric: float | None = None
    scored: bool = False

    @property
    def fence(self) -> int:
        """The number of its writer."""
        return int(self.key.rpartition("/")[2].split("-")[1])

    @property
    def awaits_score(self) -> bool:
        return self.committed and not self.scored


@dataclass(frozen=True)
class _Score:
    metric: float


@dataclass(frozen=True)
class Retention:
    """What stays: the checkpoints of the `keep` newest steps, and the best by metric.

    With `scored_later` also those that are newer than the newest with a metric, at most
    MAX_UNSCORED: one of them is being scored, any of them may be the best.
    """

    keep: int
    best: Best | None = None
    scored_later: bool = False


def make_key(run: str, step: int, fence: int = 0) -> str:
    """The directory of a new attempt; of the same step, the one of the later writer sorts last."""
    return f"{_prefix(run)}{step:08d}-{fence:06d}-{secrets.token_hex(4)}"


def commit(store: Store, key: str, manifest: Manifest) -> None:
    """Make the files that lie below `key` a checkpoint; they must all be written.

    Raises:
        HeliostatError: the bucket cannot be written; nothing is committed then.
    """
    document = {"format": FORMAT, **asdict(manifest)}
    data = json.dumps(document).encode()
    store.write(f"{key}/{_MANIFEST}", data)
    store.create(f"{key}/{_COMMITTED}", hash_bytes(data).encode())


def read_manifest(store: Store, key: str) -> Manifest:
    """The manifest of a committed checkpoint, verified.

    Raises:
        Corrupt: it is missing or is not the one that was committed.
        HeliostatError: it is of another version of this format.
    """
    data = _read(store, f"{key}/{_MANIFEST}")
    if hash_bytes(data).encode() != _read(store, f"{key}/{_COMMITTED}"):
        raise Corrupt(f"{_MANIFEST} is not the one that was committed")
    document: dict[str, Any] = json.loads(data)
    if (version := document.pop("format", None)) != FORMAT:
        raise HeliostatError(
            f"{key} is a checkpoint of format {version}, this version reads {FORMAT}: resume it "
            "with the version that wrote it, or choose another train.run"
        )
    tensors = {name: _parse_stored(told) for name, told in document.pop("tensors").items()}
    files = {
        name: File(told["size"], Span(**told["header"]))
        for name, told in document.pop("files").items()
    }
    return Manifest(files=files, tensors=tensors, **document)


def committed(store: Store, run: str) -> list[str]:
    """Keys of the committed checkpoints of `run`, the newest first."""
    return [found.key for found in find(store, run) if found.committed]


def find(store: Store, run: str) -> list[Found]:
    """Every attempt of `run`, the highest step first; their metrics are not read."""
    names: dict[str, set[str]] = {}
    for entry in store.list(_prefix(run)):
        key, _, name = entry.key.rpartition("/")
        if _DIRECTORY.fullmatch(key.rpartition("/")[2]):
            names.setdefault(key, set()).add(name)
    return [
        Found(key, _step(key), _COMMITTED in names[key], scored=_SCORE in names[key])
        for key in sorted(names, reverse=True)
    ]


def record_score(store: Store, key: str, metric: float) -> None:
    """Give the committed checkpoint at `key` the metric that it is ranked by."""
    store.write(f"{key}/{_SCORE}", json.dumps(asdict(_Score(metric))).encode())


def decide(attempts: Iterable[Found], retention: Retention) -> list[Found]:
    """Which attempts to delete once a checkpoint was committed.

    Beside what `retention` says, what is not committed but newer than all that is stays, as a
    writer may be at it; of equal metrics the newest is the best. Without a committed checkpoint
    nothing is deleted.
    """
    attempts = list(attempts)
    steps = sorted({found.step for found in attempts if found.committed}, reverse=True)
    if not steps:
        return []
    kept = {*steps[: retention.keep]}
    if retention.scored_later:
        scored = [found.step for found in attempts if found.committed and found.metric is not None]
        kept |= {step for step in steps[:MAX_UNSCORED] if step > max(scored, default=-1)}
    winner = _find_best(attempts, retention.best)
    return [
        found
        for found in attempts
        if (
            found.step not in kept and found != winner
            if found.committed
            else found.step <= steps[0]
        )
    ]


def retain(store: Store, run: str, retention: Retention) -> None:
    """Delete what `decide` says."""
    attempts = find(store, run)
    if retention.best:
        attempts = [replace(found, metric=_metric(store, found)) for found in attempts]
    for found in decide(attempts, retention):
        discard(store, found.key)


def find_best(store: Store, run: str, best: Best) -> str | None:
    """The key of the checkpoint with the best metric, None if none has one."""
    attempts = [replace(found, metric=_metric(store, found)) for found in find(store, run)]
    winner = _find_best(attempts, best)
    return winner.key if winner else None


def revoke(store: Store, key: str) -> None:
    """Take the marker from a checkpoint that does not verify, so that it counts no more."""
    store.delete(f"{key}/{_COMMITTED}")


def collect(store: Store, run: str) -> list[str]:
    """Delete every attempt of `run` that was not committed; their keys.

    Only who has the run's lease may call it, before it begins to write.
    """
    leftovers = [found.key for found in find(store, run) if not found.committed]
    for key in leftovers:
        discard(store, key)
    return leftovers


def discard(store: Store, key: str) -> None:
    """Delete an attempt, its marker first: an interruption leaves nothing half-visible."""
    store.delete(f"{key}/{_COMMITTED}")
    for entry in list(store.list(f"{key}/")):
        store.delete(entry.key)


def _find_best(attempts: Iterable[Found], best: Best | None) -> Found | None:
    scored = [
        (found.metric if best == "higher" else -found.metric, found.step, found.key, found)
        for found in attempts
        if found.committed and found.metric is not None and math.isfinite(found.metric)
    ]
    return max(scored)[-1] if scored and best else None


def _metric(store: Store, found: Found) -> float | None:
    if not found.committed:
        return None
    try:
        if found.scored:
            return read_document(store, f"{found.key}/{_SCORE}", _Score).metric
        return read_manifest(store, found.key).metric
    except Damaged:
        store.delete(f"{found.key}/{_SCORE}")  # so that it is scored again
        return None
    except (Corrupt, Missing):
        return None


def _parse_stored(told: Mapping[str, Any]) -> Stored:
    pieces = [
        Piece(tuple(piece["at"]), tuple(piece["shape"]), piece["file"], Span(**piece["span"]))
        for piece in told["pieces"]
    ]
    return Stored(told["dtype"], tuple(told["shape"]), tuple(pieces))


def _read(store: Store, key: str) -> bytes:
    try:
        return store.read(key)
    except Missing as error:
        raise Corrupt(f"{key} is missing") from error


def _prefix(run: str) -> str:
    return f"runs/{run}/checkpoints/"


def _step(key: str) -> int:
    return int(key.rpartition("/")[2].partition("-")[0])
