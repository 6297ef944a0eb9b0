"""A checkpoint in the bucket to a run's state, whatever the number of ranks; every byte verified.

The planners of torch.distributed.checkpoint decide which part of which piece a rank needs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from heliostat.errors import HeliostatError
from heliostat.storage import Missing, Store
from heliostat.train import checkpoint, pieces
from heliostat.train.checkpoint import Corrupt, Manifest, Piece
from heliostat.train.peers import Peers, open_peers
from heliostat.train.span import Span, hash_bytes
from heliostat.train.state import AVERAGE, MODEL, State, install, make_targets, take_local

PARALLEL_READS = 8
READ_BYTES = 64 * 1024**2

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Restored:
    """What a run goes on from: `extra` as it was given to `begin`."""

    key: str
    step: int
    extra: dict[str, Any]


@dataclass(frozen=True)
class Weights:
    """The weights of a checkpoint by name, the averages where the run keeps them."""

    key: str
    step: int
    tensors: dict[str, Tensor]


def read_newest(
    store: Store, run: str, state: State, warn: Warn = lambda _: None
) -> Restored | None:
    """Put the newest checkpoint that verifies into `state`, whatever the number of ranks.

    Every rank must call this. One that does not verify on some rank is passed over by all for the
    one before; `warn` gets a sentence why. Nothing in `state` changes before every byte that any
    rank needs was verified. None if there is no checkpoint, or a single one and that is damaged.

    Raises:
        HeliostatError: the state has other tensors than the checkpoint, or none of several
            verifies: then it is rather who reads them that is damaged, and they are kept.
    """
    peers = open_peers()
    damaged: list[str] = []
    for key in peers.first(lambda: checkpoint.committed(store, run)):
        try:
            restored = _restore(store, key, state, peers)
        except Corrupt as error:
            warn(f"passing over checkpoint {key}: {error}")
            damaged.append(key)
        else:
            _revoke(store, damaged, peers)
            return restored
    if len(damaged) > 1:
        raise HeliostatError(
            f"none of the {len(damaged)} checkpoints of run {run} is what was committed: try on "
            f"another machine, or delete {store.uri}/{damaged[-1].rpartition('/')[0]} to begin anew"
        )
    _revoke(store, damaged, peers)
    return None


def _revoke(store: Store, damaged: Iterable[str], peers: Peers) -> None:
    """Else retention would take them for the newest, and delete what is written after them."""
    for key in damaged:
        peers.first(partial(checkpoint.revoke, store, key))


def read_weights(store: Store, key: str) -> Weights:
    """The whole weights of the committed checkpoint at `key`.

    Raises:
        Corrupt: they are not what was committed.
    """
    manifest = checkpoint.read_manifest(store, key)
    names = {name.removeprefix(MODEL): name for name in manifest.tensors if name.startswith(MODEL)}
    for name in manifest.tensors:
        if name.startswith(AVERAGE):
            names[name.removeprefix(AVERAGE)] = name
    buffers = {
        name: torch.empty(stored.shape, dtype=pieces.find_type(stored.dtype))
        for name, stored in manifest.tensors.items()
        if name in names.values()
    }
    _fill(store, key, manifest, buffers, buffers)
    return Weights(key, manifest.step, {short: buffers[name] for short, name in names.items()})


@dataclass(frozen=True)
class _Bytes:
    """What is read and verified as one."""

    file: str
    span: Span


class _Buffered(DefaultLoadPlanner):
    """Has tensors filled in buffers that take the place of the local parts of the targets."""

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._buffers = buffers

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._buffers[index.fqn]


def _restore(store: Store, key: str, state: State, peers: Peers) -> Restored:
    manifest = peers.first(lambda: checkpoint.read_manifest(store, key))
    targets = make_targets(state, {name: told.shape for name, told in manifest.tensors.items()})
    buffers: dict[str, Tensor] = {}

    def read() -> None:
        _check_alike(targets, manifest)
        for name, target in targets.items():
            dtype = pieces.find_type(manifest.tensors[name].dtype)
            buffers[name] = torch.empty(take_local(target).shape, dtype=dtype)
        _fill(store, key, manifest, targets, buffers)

    peers.all(read)
    for name, target in targets.items():
        take_local(target).copy_(buffers[name])
    install(state, targets)
    return Restored(key, manifest.step, dict(manifest.extra))


def _check_alike(targets: Mapping[str, Tensor], manifest: Manifest) -> None:
    held = {name: told.shape for name, told in manifest.tensors.items()}
    wanted = {name: tuple(target.shape) for name, target in targets.items()}
    for name in sorted(held.keys() | wanted.keys()):
        if held.get(name) != wanted.get(name):
            raise HeliostatError(
                f"{name} is {_show(wanted.get(name))} in this run and {_show(held.get(name))} in "
                f"the checkpoint of step {manifest.step}: resume with the model that wrote it, or "
                "choose another train.run"
            )


def _show(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {list(shape)}"


def _fill(
    store: Store,
    key: str,
    manifest: Manifest,
    targets: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
) -> None:
    """Read what this rank has of `targets` into `buffers`, every piece verified by its hash.

    Raises:
        Corrupt: a file is missing, or a piece is not the one that was committed.
    """
    planner = _Buffered(buffers)
    planner.set_up_planner(dict(targets), _to_metadata(manifest))
    wanted: dict[_Bytes, list[tuple[Piece, ReadItem]]] = {}
    for item in planner.create_local_plan().items:
        piece = _find_piece(manifest, item.storage_index)
        wanted.setdefault(_Bytes(piece.file, piece.span), []).append((piece, item))
    for file in {part.file for part in wanted}:
        told, entry = manifest.files[file], store.stat(f"{key}/{file}")
        if entry is None or entry.size != told.size:
            size = f"has {entry.size} bytes" if entry else "is missing"
            raise Corrupt(f"{file} {size}, {told.size} bytes were committed")
        wanted[_Bytes(file, told.header)] = []

    def read(adjacent: list[_Bytes]) -> None:
        data = memoryview(bytearray(_read_verified(store, key, adjacent)))
        for part in adjacent:
            body = _cut(data, adjacent, part)
            for piece, item in wanted[part]:
                dtype = manifest.tensors[item.storage_index.fqn].dtype
                box = zip(item.storage_offsets, item.lengths, strict=True)
                source = pieces.decode(body, dtype, piece.shape)
                chosen = source[tuple(slice(begin, begin + length) for begin, length in box)]
                planner.resolve_tensor(item).copy_(chosen)

    with ThreadPoolExecutor(PARALLEL_READS) as threads:
        list(threads.map(read, _adjoin(wanted)))


def _adjoin(wanted: Iterable[_Bytes]) -> Iterator[list[_Bytes]]:
    """What lies one after the other in a file together, to be read at once."""
    group: list[_Bytes] = []
    for part in sorted(wanted, key=lambda part: (part.file, part.span.offset)):
        if group and not _is_next(group, part):
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _is_next(group: list[_Bytes], part: _Bytes) -> bool:
    last, begin = group[-1], group[0].span.offset
    adjacent = (last.file, last.span.offset + last.span.size) == (part.file, part.span.offset)
    return adjacent and part.span.offset + part.span.size - begin <= READ_BYTES


def _read_verified(store: Store, key: str, adjacent: list[_Bytes]) -> bytearray:
    """What is damaged is read once more: a network may garble what the bucket keeps well."""
    data = _read_range(store, key, adjacent)
    if _find_damaged(data, adjacent) is None:
        return data
    data = _read_range(store, key, adjacent)
    if part := _find_damaged(data, adjacent):
        raise Corrupt(f"{part.file} does not match a SHA-256, at byte {part.span.offset:,}")
    return data


def _find_damaged(data: bytearray, adjacent: list[_Bytes]) -> _Bytes | None:
    whole = memoryview(data)
    for part in adjacent:
        if hash_bytes(_cut(whole, adjacent, part)) != part.span.sha256:
            return part
    return None


def _cut(data: memoryview, adjacent: list[_Bytes], part: _Bytes) -> memoryview:
    start = part.span.offset - adjacent[0].span.offset
    return data[start : start + part.span.size]


def _read_range(store: Store, key: str, adjacent: list[_Bytes]) -> bytearray:
    file, begin, last = adjacent[0].file, adjacent[0].span.offset, adjacent[-1].span
    try:
        return store.read_range(f"{key}/{file}", begin, last.offset + last.size - begin)
    except Missing as error:
        raise Corrupt(f"{file} is missing") from error


def _find_piece(manifest: Manifest, index: MetadataIndex) -> Piece:
    at = tuple(index.offset or ())
    return next(piece for piece in manifest.tensors[index.fqn].pieces if piece.at == at)


def _to_metadata(manifest: Manifest) -> Metadata:
    """What the planners know of a checkpoint, without a word of how it is stored."""
    return Metadata(
        {
            name: TensorStorageMetadata(
                TensorProperties(dtype=pieces.find_type(stored.dtype)),
                torch.Size(stored.shape),
                [
                    ChunkStorageMetadata(torch.Size(piece.at), torch.Size(piece.shape))
                    for piece in stored.pieces
                ],
            )
            for name, stored in manifest.tensors.items()
        }
    )
