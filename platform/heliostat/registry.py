"""Immutable model versions, their aliases, evaluations and lineage, kept as JSON in the bucket."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from types import EllipsisType
from typing import Any

import numpy as np
import safetensors

from heliostat.errors import HeliostatError
from heliostat.spec import NAME_PATTERN, NAME_RULE, check_name
from heliostat.storage import Conflict, Missing, Store
from heliostat.storage.documents import read_document

NAME, NUMBER = NAME_PATTERN.pattern, "[1-9][0-9]{0,8}"
VERSION_KEY = re.compile(rf"models/({NAME})/versions/({NUMBER})\.json")
ALIAS_KEY = re.compile(rf"models/{NAME}/aliases/({NAME})\.json")
REF = re.compile(rf"({NAME})(?::({NUMBER})|@({NAME}))?")
MAX_NUMBER = 999_999_999

# A retried publish looks for itself among this many of the newest versions.
RECENT_VERSIONS = 20

FOREIGN_FORMATS = {
    b"PK\x03\x04": "a zip archive, as torch.save writes it (it holds pickles)",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    **{bytes([0x80, protocol]): "a pickle" for protocol in range(2, 6)},
}

# A float is NaN or infinite when all bits of its exponent are set (F8_E4M3: all bits but the sign).
EXPONENT_BITS: dict[str, np.unsignedinteger[Any]] = {
    "F64": np.uint64(0x7FF0_0000_0000_0000),
    "F32": np.uint32(0x7F80_0000),
    "C64": np.uint32(0x7F80_0000),
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
    "F8_E5M2": np.uint8(0x7C),
    "F8_E4M3": np.uint8(0x7F),
}


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What a training run hands in to become a version."""

    name: str
    output: dict[str, Any]  # heliostat.signature.Output as JSON
    features: dict[str, Any]  # heliostat.data.features as JSON
    spec: dict[str, Any]  # the resolved RunSpec
    data_name: str
    data_version: str
    run: str
    step: int
    code: str  # SHA-256 of the code archive, "" when none was stored
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Version(Draft):
    """A published model: it never changes."""

    number: int
    created: str  # UTC, ISO 8601
    weights_sha256: str
    weights_bytes: int

    @property
    def ref(self) -> str:
        return f"{self.name}:{self.number}"

    @property
    def key(self) -> str:
        return _version_key(self.name, self.number)

    @property
    def weights_key(self) -> str:
        return f"blobs/{self.weights_sha256}"


@dataclass(frozen=True)
class Evaluation:
    data_version: str
    split: str
    scores: dict[str, Any]


@dataclass(frozen=True)
class TracedShard:
    key: str
    split: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class Lineage:
    """The way back from a version to what it was made of; `missing` names what is gone."""

    version: Version
    source: str | None
    rows: dict[str, int]  # by split
    shards: tuple[TracedShard, ...]
    missing: tuple[str, ...]


def publish(store: Store, draft: Draft, weights: bytes, number: int | None = None) -> Version:
    """Store `weights` by hash, then claim a version number for them.

    Without `number` the next free one is taken; publishing the same weights of the same run and
    step again returns the version that exists.

    Raises:
        HeliostatError: the name or the weights are refused, or `number` is taken.
    """
    check_name(draft.name)
    check_metrics(draft.metrics)
    check_weights(weights)
    numbers = _list_numbers(store, draft.name)
    version = Version(
        **asdict(draft),
        number=max(numbers, default=0) + 1 if number is None else number,
        created=_now(),
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        weights_bytes=len(weights),
    )
    _store_weights(store, version, weights)
    if number is None:
        return _claim_next(store, version, numbers[-RECENT_VERSIONS:])
    return _claim_given(store, version)


def check_weights(weights: bytes) -> None:
    """Refuse what is not a whole safetensors file of finite numbers, whatever its name says.

    Raises:
        HeliostatError: names the format that was found, or the tensor that is not finite.
    """
    try:
        tensors = safetensors.deserialize(weights)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        found = next(
            (text for magic, text in FOREIGN_FORMATS.items() if weights.startswith(magic)),
            f"{len(weights)} bytes of something else ({error!s:.80})",
        )
        raise HeliostatError(
            f"weights must be a safetensors file, given {found}: "
            "save them with safetensors.torch.save_file"
        ) from error
    for name, tensor in tensors:
        if _has_non_finite(tensor["dtype"], tensor["data"]):
            raise HeliostatError(
                f"tensor {name[:80]!r} holds NaN or infinity: such weights are never published, "
                "publish an earlier checkpoint of the run"
            )


def check_metrics(metrics: dict[str, float]) -> None:
    """Refuse a metric that is NaN or infinite.

    Raises:
        HeliostatError: names the metric.
    """
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise HeliostatError(
                f"metric {name[:80]!r} is {value}: a version is published with finite metrics only"
            )


def resolve(store: Store, ref: str) -> Version:
    """The version behind "name:3", "name@alias" or "name" (its newest).

    Raises:
        HeliostatError: no such version; the sentence lists what exists.
    """
    match = REF.fullmatch(ref)
    if not match:
        raise HeliostatError(
            f"{ref[:80]!r} is not a model version: write NAME:NUMBER, NAME@ALIAS or NAME, "
            f"each name {NAME_RULE}"
        )
    name, digits, alias = match.groups()
    number = int(digits) if digits else _find_number(store, name, alias)
    version = _find_version(store, name, number) if number else None
    if version is None:
        raise HeliostatError(f"there is no model version {ref!r}: {_describe(store, name)}")
    return version


def load_weights(store: Store, version: Version) -> bytes:
    """The safetensors bytes of `version`, exactly as published.

    Raises:
        HeliostatError: they are gone, or their SHA-256 is not the published one.
    """
    weights = store.read(version.weights_key)
    found = hashlib.sha256(weights).hexdigest()
    if found != version.weights_sha256:
        raise HeliostatError(
            f"{store.uri}/{version.weights_key} is not what {version.ref} was published with "
            f"(SHA-256 {found[:16]}..., {len(weights)} of {version.weights_bytes} bytes): "
            "restore the object or deploy another version"
        )
    return weights


def list_names(store: Store) -> list[str]:
    """Names with at least one version, sorted."""
    matches = (VERSION_KEY.fullmatch(entry.key) for entry in store.list("models/"))
    return sorted({match[1] for match in matches if match})


def list_versions(store: Store, name: str) -> list[Version]:
    """All versions of `name`, oldest first."""
    return list(_read_versions(store, name, _list_numbers(store, name)))


def list_aliases(store: Store, name: str) -> dict[str, int]:
    """Version number by alias, sorted by alias."""
    entries = store.list(f"models/{check_name(name)}/aliases/")
    matches = [match for entry in entries if (match := ALIAS_KEY.fullmatch(entry.key))]
    numbers = {match[1]: _read_alias(store, match[0])[1] for match in matches}
    return {alias: number for alias, number in sorted(numbers.items()) if number}


def set_alias(
    store: Store, name: str, alias: str, number: int, expected: int | EllipsisType | None = ...
) -> None:
    """Point `alias` of `name` at version `number`.

    With `expected` (None: the alias does not exist yet) it moves only if it points there now;
    without, it moves whatever others do meanwhile.

    Raises:
        HeliostatError: no such version, or the alias is not at `expected`.
    """
    key = _alias_key(check_name(name), check_name(alias))
    resolve(store, f"{name}:{number}")
    while True:
        etag, current = _read_alias(store, key)
        if expected not in (..., current):
            raise HeliostatError(
                f"{name}@{alias} is {_place(current)}, expected {_place(expected)}: "
                "somebody moved it, look again before moving it"
            )
        # The time makes each move a new ETag, so a move away and back is seen as a change.
        data = _to_json({"version": number, "moved": _now()})
        with suppress(Conflict):
            store.replace(key, data, etag) if etag else store.create(key, data)
            return


def record_evaluation(
    store: Store, version: Version, data_version: str, split: str, scores: dict[str, Any]
) -> None:
    """Keep `scores` (JSON values) of `version` on one split of one data version beside it."""
    name = f"{check_name(data_version)}-{check_name(split)}.json"
    record = {"data_version": data_version, "split": split, "scores": scores}
    store.write(_evaluations_prefix(version) + name, _to_json(record))


def list_evaluations(store: Store, version: Version) -> list[Evaluation]:
    """Raises HeliostatError: a record is damaged; evaluating again writes it anew."""
    entries = store.list(_evaluations_prefix(version))
    return [read_document(store, entry.key, Evaluation) for entry in entries]


def trace(store: Store, ref: str) -> Lineage:
    """Walk from a version back to the shards and the source it was trained on.

    Raises:
        HeliostatError: there is no such version. Anything missing behind it is listed instead.
    """
    version = resolve(store, ref)
    manifest_key = f"data/{version.data_name}/{version.data_version}/manifest.json"
    needed = [version.weights_key, f"runs/{version.run}/run.json"]
    needed += [f"code/{version.code}.zip"] if version.code else []
    missing = [key for key in needed if store.stat(key) is None]
    try:
        manifest = json.loads(store.read(manifest_key))
        source, rows = str(manifest["source"]), dict(manifest["rows"])
        shards = tuple(_traced_shard(shard) for shard in manifest["shards"])
    except (Missing, ValueError, TypeError, KeyError) as error:
        reason = "gone" if isinstance(error, Missing) else "not a manifest"
        return Lineage(version, None, {}, (), (*missing, f"{manifest_key} ({reason})"))
    stored = {entry.key for entry in store.list(f"data/{version.data_name}/shards/")}
    missing += [shard.key for shard in shards if shard.key not in stored]
    return Lineage(version, source, rows, shards, tuple(missing))


def _traced_shard(shard: dict[str, Any]) -> TracedShard:
    return TracedShard(**{field.name: shard[field.name] for field in fields(TracedShard)})


def _has_non_finite(dtype: str, data: bytes) -> bool:
    bits = EXPONENT_BITS.get(dtype)
    if bits is None:
        return False
    return bool(np.any(np.frombuffer(data, bits.dtype.newbyteorder("<")) & bits == bits))


def _store_weights(store: Store, version: Version, weights: bytes) -> None:
    stored = store.stat(version.weights_key)
    if stored is None or stored.size != len(weights):
        store.write(version.weights_key, weights)


def _claim_next(store: Store, version: Version, recent: Iterable[int]) -> Version:
    """Claim `version.number` or the first free one after it, unless a recent one is its twin."""
    while True:
        for other in _read_versions(store, version.name, recent):
            if _origin(other) == _origin(version):
                return other
        try:
            return _claim(store, version)
        except Conflict:
            recent = [version.number]
            version = replace(version, number=version.number + 1)


def _claim_given(store: Store, version: Version) -> Version:
    if not 1 <= version.number <= MAX_NUMBER:
        raise HeliostatError(f"{version.ref} is not a version: numbers go from 1 to {MAX_NUMBER}")
    try:
        return _claim(store, version)
    except Conflict as error:
        raise HeliostatError(
            f"{version.ref} is taken and a version never changes: "
            "publish without a number to get the next free one"
        ) from error


def _claim(store: Store, version: Version) -> Version:
    store.create(version.key, _to_json(asdict(version)))
    return version


def _origin(version: Version) -> tuple[str, int, str]:
    return version.run, version.step, version.weights_sha256


def _list_numbers(store: Store, name: str) -> list[int]:
    entries = store.list(f"models/{check_name(name)}/versions/")
    matches = (VERSION_KEY.fullmatch(entry.key) for entry in entries)
    return sorted(int(match[2]) for match in matches if match)


def _read_versions(store: Store, name: str, numbers: Iterable[int]) -> Iterator[Version]:
    versions = (_find_version(store, name, number) for number in numbers)
    return (version for version in versions if version)


def _find_version(store: Store, name: str, number: int) -> Version | None:
    key = _version_key(name, number)
    try:
        record = json.loads(store.read(key))
        known = {field.name: record[field.name] for field in fields(Version)}
        return Version(**known)
    except Missing:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise HeliostatError(
            f"{store.uri}/{key} is not a version record ({error!r:.80}): restore the object"
        ) from error


def _find_number(store: Store, name: str, alias: str | None) -> int | None:
    """The number that `alias` points to, or the newest one."""
    if alias:
        return _read_alias(store, _alias_key(name, alias))[1]
    return max(_list_numbers(store, name), default=None)


def _read_alias(store: Store, key: str) -> tuple[str, int] | tuple[None, None]:
    # ETag first: if the object changes between the two, the number is too new and the ETag loses.
    entry = store.stat(key)
    if entry is None:
        return None, None
    try:
        return entry.etag, int(json.loads(store.read(key))["version"])
    except (ValueError, TypeError, KeyError) as error:
        raise HeliostatError(f"{store.uri}/{key} is not an alias: delete the object") from error


def _describe(store: Store, name: str) -> str:
    """What exists instead, in a few words."""
    if numbers := _list_numbers(store, name):
        newest = ", ".join(str(number) for number in reversed(numbers[-10:]))
        aliases = ", ".join(list_aliases(store, name)) or "none"
        return f"the newest versions of {name} are {newest}, its aliases: {aliases}"
    if names := list_names(store):
        return f"the models in {store.uri} are {', '.join(names[:20])}"
    return f"no model has been published to {store.uri} yet"


def _place(number: int | EllipsisType | None) -> str:
    return "at no version" if number is None else f"at version {number}"


def _version_key(name: str, number: int) -> str:
    return f"models/{name}/versions/{number}.json"


def _alias_key(name: str, alias: str) -> str:
    return f"models/{name}/aliases/{alias}.json"


def _evaluations_prefix(version: Version) -> str:
    return f"models/{version.name}/evaluations/{version.number}/"


def _to_json(record: dict[str, Any]) -> bytes:
    return json.dumps(record, indent=1, sort_keys=True, allow_nan=False).encode()


def _now() -> str:
    return datetime.now(UTC).isoformat()
