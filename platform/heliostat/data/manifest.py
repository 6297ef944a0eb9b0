"""What a prepared data set is: its shards by hash, its split, its labels and its statistics."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from heliostat.data.features import Features, features_from_json, features_to_json, input_of
from heliostat.errors import HeliostatError
from heliostat.signature import Output, Signature, output_from_json, output_to_json
from heliostat.spec import check_name, digest
from heliostat.storage import Entry, Missing, Store

SPLITS = ("train", "validation", "test")
SHARD_FORMAT = 3
REPORTED = ("rows_read", "rows_bad", "objects_ignored")


@dataclass(frozen=True)
class RowGroup:
    """Rows of a shard that are read together; `sha256` is that of file[offset : offset + bytes]."""

    offset: int
    bytes: int
    rows: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """One Parquet file of one split; its key holds its SHA-256, `etag` is what the store says.

    `footer` is that of the file, compressed in base64: a row group is read with one request.
    """

    key: str
    split: str
    rows: int
    bytes: int
    sha256: str
    footer: str
    groups: tuple[RowGroup, ...]
    etag: str = ""


@dataclass(frozen=True)
class Manifest:
    """A version of a data set: `rows` by split, `schema` by column, `report` of the cleaning.

    The report has at least what REPORTED names.
    """

    name: str
    version: str
    source: str
    format: str
    schema: dict[str, str]
    output: Output
    rows: dict[str, int]
    features: Features
    shards: tuple[Shard, ...]
    spec: dict[str, Any]
    report: dict[str, Any]

    @property
    def signature(self) -> Signature:
        return Signature(input_of(self.features), self.output)

    def shards_of(self, split: str) -> tuple[Shard, ...]:
        return tuple(shard for shard in self.shards if shard.split == split)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "features": features_to_json(self.features),
            "output": output_to_json(self.output),
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Manifest":
        fields = document | {
            "output": output_from_json(document["output"]),
            "features": features_from_json(document["features"]),
            "shards": tuple(map(shard_from_json, document["shards"])),
        }
        if lost := set(REPORTED) - fields["report"].keys():
            raise KeyError(*lost)
        return cls(**fields)


def content_version(manifest: Manifest) -> str:
    """16 hex digits over all that training sees; the data set's name and source are not part."""
    document = manifest.to_json()
    content = {key: document[key] for key in ("schema", "output", "features", "rows", "shards")}
    for shard in content["shards"]:
        del shard["key"], shard["etag"]
    return digest(content | {"shard_format": SHARD_FORMAT})[:16]


def data_key(name: str, *parts: str) -> str:
    """The key of something that belongs to the data set `name`."""
    return "/".join(("data", check_name(name), *parts))


def load_manifest(store: Store, name: str, version: str) -> Manifest:
    """The manifest of `version`.

    Raises:
        HeliostatError: no such version, or the manifest was changed after it was written.
    """
    key = data_key(name, version, "manifest.json")
    try:
        manifest = Manifest.from_json(json.loads(store.read(key)))
    except Missing as error:
        raise HeliostatError(
            f"there is no version {version} of the data set {name} under {store.uri}, "
            f"prepared are: {', '.join(_versions(store, name)) or 'none'}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HeliostatError(f"{store.uri}/{key} is damaged: prepare the data again") from error
    if manifest.name != name or content_version(manifest) != manifest.version:
        raise HeliostatError(f"{store.uri}/{key} was changed after it was written: prepare again")
    return manifest


def check_shards(store: Store, manifest: Manifest) -> None:
    """Check that every shard is stored as it was written.

    An object whose size and etag are those of the manifest is taken for unchanged; one with another
    etag, as after a copy to another bucket, is read and its SHA-256 compared.

    Raises:
        HeliostatError: a shard is missing, empty, cut or replaced; names up to three.
    """
    stored = {entry.key: entry for entry in store.list(data_key(manifest.name, "shards/"))}
    wrong = [
        f"{shard.key} {problem}"
        for shard in manifest.shards
        if (problem := _find_problem(store, shard, stored.get(shard.key)))
    ]
    if wrong:
        raise HeliostatError(
            f"{len(wrong)} of {len(manifest.shards)} shards of {manifest.name}@{manifest.version} "
            f"under {store.uri} cannot be used, prepare the data again: {'; '.join(wrong[:3])}"
        )


def _find_problem(store: Store, shard: Shard, stored: Entry | None) -> str | None:
    if stored is None:
        return "is missing"
    if stored.size != shard.bytes:
        return f"has {stored.size:,} bytes instead of {shard.bytes:,}"
    if stored.etag != shard.etag and not holds(store, shard.key, shard.sha256):
        return "does not hold the bytes that were written"
    return None


def holds(store: Store, key: str, sha256: str) -> bool:
    """Whether the object has this SHA-256 (hex); it is read in a stream."""
    with store.open(key) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == sha256  # type: ignore[arg-type]


def shard_from_json(document: dict[str, Any]) -> Shard:
    """The inverse of `dataclasses.asdict`."""
    groups = tuple(RowGroup(**group) for group in document["groups"])
    return Shard(**document | {"groups": groups})


def _versions(store: Store, name: str) -> Iterator[str]:
    for entry in store.list(data_key(name) + "/"):
        version, _, file = entry.key.removeprefix(data_key(name) + "/").partition("/")
        if file == "manifest.json":
            yield version
