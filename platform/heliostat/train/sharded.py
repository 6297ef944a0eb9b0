"""A run's state to and from checkpoints in the bucket: each rank its part, in the background.

The planners of torch.distributed.checkpoint decide which rank writes which part of which tensor
and, for any other number of ranks, who reads what; here the bytes are moved, without pickle.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan

from heliostat.errors import HeliostatError
from heliostat.storage import Missing, Store
from heliostat.train import checkpoint, pieces
from heliostat.train.checkpoint import Best, Corrupt, File, Manifest, Piece, Stored
from heliostat.train.lease import Fence
from heliostat.train.peers import Peers, open_peers
from heliostat.train.span import Span, hash_bytes
from heliostat.train.state import (
    AVERAGE,
    MODEL,
    OPTIMIZER,
    State,
    install,
    make_targets,
    name_tensors,
    take_local,
)

FILE_BYTES = 128 * 1024**2  # held in memory while it is uploaded
PARALLEL_WRITES = 4
PARALLEL_READS = 8
READ_BYTES = 64 * 1024**2

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint: how long the writing took after `begin`, and what this rank wrote."""

    key: str
    step: int
    seconds: float
    written_bytes: int


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


class Writer:
    """Writes checkpoints of a run while it goes on; every rank has one and calls it alike.

    `keep` and `best` are what `checkpoint.decide` retains by. `saved` is the newest that was
    committed. With a `fence` on rank 0, a writer that another has followed commits
    nothing any more.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        *,
        keep: int,
        best: Best | None = None,
        fence: Fence | None = None,
    ) -> None:
        self.saved: Saved | None = None
        self._store, self._run, self._keep, self._best = store, run, keep, best
        self._fence = fence
        self._peers = open_peers()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Saved] | None = None
        self._plan: _Plan | None = None
        self._staged: dict[str, Tensor] = {}

    def begin(
        self, step: int, state: State, extra: Mapping[str, Any], metric: float | None = None
    ) -> float:
        """Copy the state and write it in the background; the seconds for which this held up.

        `extra` is any JSON. It waits for the checkpoint before, of which one is written at a time.

        Raises:
            HeliostatError: the checkpoint before could not be written.
        """
        began = time.perf_counter()
        self.finish()
        tensors = name_tensors(state)
        if self._plan is None or self._plan.shapes != _shapes(tensors):
            self._plan = _make_plan(self._peers, tensors)
        plan = self._plan
        self._staged = _stage(plan.mine, tensors, self._staged)
        task = _Task(step, json.loads(json.dumps(extra)), metric, time.perf_counter())
        self._pending = self._thread.submit(self._write, task, plan, self._staged)
        return time.perf_counter() - began

    def finish(self) -> float:
        """Wait until what was begun is committed; the seconds for which this held up.

        Raises:
            HeliostatError: it could not be written.
        """
        began = time.perf_counter()
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self.saved = pending.result()
        return time.perf_counter() - began

    def _write(self, task: "_Task", plan: "_Plan", staged: Mapping[str, Tensor]) -> Saved:
        """In the background: all ranks' files, then the commit, then retention, both by rank 0."""
        peers, store = self._peers, self._store
        number = self._fence.number if self._fence else 0
        key = peers.first(lambda: checkpoint.make_key(self._run, task.step, number))
        try:
            peers.all(lambda: _check_finite(staged, task.step))
            written = peers.all(lambda: _write_files(store, key, peers.rank, plan.mine, staged))
            manifest = Manifest(
                task.step,
                number,
                task.metric,
                task.extra,
                _join(written).files,
                _describe(plan.shapes, written),
            )
            peers.first(lambda: self._commit(key, manifest))
        except HeliostatError:
            peers.first(lambda: _try(lambda: checkpoint.discard(store, key)))
            raise
        seconds = time.perf_counter() - task.began
        return Saved(
            key, task.step, seconds, sum(file.size for file in written[peers.rank].files.values())
        )

    def _commit(self, key: str, manifest: Manifest) -> None:
        if self._fence:
            self._fence.check()
        checkpoint.commit(self._store, key, manifest)
        _try(lambda: checkpoint.retain(self._store, self._run, self._keep, self._best))


def _try(act: Callable[[], None]) -> None:
    """Cleaning up may fail: the next checkpoint, or a resumption, cleans up again."""
    with contextlib.suppress(HeliostatError):
        act()


def read_newest(
    store: Store, run: str, state: State, warn: Warn = lambda _: None
) -> Restored | None:
    """Put the newest checkpoint that verifies into `state`, whatever the number of ranks.

    Every rank must call this. One that does not verify on some rank is passed over by all for the
    one before; `warn` gets a sentence why. Nothing in `state` changes before every byte that any
    rank needs was verified. None if there is no checkpoint.

    Raises:
        HeliostatError: the state has other tensors than the checkpoint.
    """
    peers = open_peers()
    for key in peers.first(lambda: checkpoint.committed(store, run)):
        try:
            return _restore(store, key, state, peers)
        except Corrupt as error:
            warn(f"passing over checkpoint {key}: {error}")
            # Else retention would take it for the newest, and delete what is written after it.
            peers.first(partial(checkpoint.revoke, store, key))
    return None


def read_newest_weights(store: Store, run: str, warn: Warn = lambda _: None) -> Weights | None:
    """The whole weights of the newest checkpoint that verifies, in this one process, or None."""
    for key in checkpoint.committed(store, run):
        try:
            return read_weights(store, key)
        except Corrupt as error:
            warn(f"passing over checkpoint {key}: {error}")
    return None


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
class _Part:
    """The box of a tensor that this rank writes."""

    name: str
    at: tuple[int, ...]
    whole: bool

    @property
    def label(self) -> str:
        """Its name in the file."""
        return self.name if self.whole else f"{self.name}@{','.join(map(str, self.at))}"


@dataclass(frozen=True)
class _Plan:
    """Who writes what while the tensors keep their shapes."""

    shapes: Mapping[str, tuple[torch.Size, torch.dtype]]
    mine: tuple[_Part, ...]


@dataclass(frozen=True)
class _Task:
    step: int
    extra: Mapping[str, Any]
    metric: float | None
    began: float


@dataclass(frozen=True)
class _Written:
    """The files of a rank, and the piece of each tensor that it wrote."""

    files: Mapping[str, File]
    pieces: Mapping[str, Piece]


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


def _make_plan(peers: Peers, tensors: Mapping[str, Tensor]) -> _Plan:
    """The default plan: what every rank has is written by one, and all about the same amount."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=peers.rank == 0)
    plans, _ = planner.create_global_plan(peers.all(planner.create_local_plan))
    return _Plan(_shapes(tensors), tuple(_make_parts(plans[peers.rank])))


def _make_parts(plan: SavePlan) -> Iterator[_Part]:
    for item in plan.items:
        assert item.tensor_data is not None, f"{item.index.fqn} is not a tensor"
        box = item.tensor_data.chunk
        if box.sizes.numel():
            whole = box.sizes == item.tensor_data.size
            yield _Part(item.index.fqn, tuple(box.offsets), whole)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _stage(
    parts: Iterable[_Part], tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Copies of the parts in host memory, in that of the checkpoint `before` where it fits."""
    staged: dict[str, Tensor] = {}
    on_device = False
    for part in parts:
        local = take_local(tensors[part.name])
        copy = before.get(part.name)
        if copy is None or (copy.shape, copy.dtype) != (local.shape, local.dtype):
            copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
        staged[part.name] = copy.copy_(local, non_blocking=True)
        on_device = on_device or local.is_cuda
    if on_device:
        torch.cuda.current_stream().synchronize()
    return staged


def _check_finite(staged: Mapping[str, Tensor], step: int) -> None:
    for name, tensor in staged.items():
        if name.startswith(OPTIMIZER) or not tensor.is_floating_point():
            continue
        if not torch.linalg.vector_norm(tensor, torch.inf).isfinite():
            raise HeliostatError(
                f"{name} has values that are not finite after step {step}: lower train.optimizer.lr"
            )


def _write_files(
    store: Store, key: str, rank: int, parts: Iterable[_Part], staged: Mapping[str, Tensor]
) -> _Written:
    by_name = {part.name: part for part in parts}
    sizes = {name: staged[name].nbytes for name in by_name}

    def write(numbered: tuple[int, list[str]]) -> _Written:
        number, names = numbered
        file = f"rank-{rank:05d}-{number:03d}.safetensors"
        data, header, spans = pieces.encode({by_name[name].label: staged[name] for name in names})
        store.write(f"{key}/{file}", data)
        placed = {
            part.name: Piece(part.at, tuple(staged[part.name].shape), file, spans[part.label])
            for part in map(by_name.__getitem__, names)
        }
        return _Written({file: File(len(data), header)}, placed)

    with ThreadPoolExecutor(PARALLEL_WRITES) as threads:
        return _join(threads.map(write, enumerate(pieces.split_files(sizes, FILE_BYTES))))


def _join(written: Iterable[_Written]) -> _Written:
    files: dict[str, File] = {}
    placed: dict[str, Piece] = {}
    for part in written:
        files |= part.files
        placed |= part.pieces
    return _Written(files, placed)


def _describe(
    shapes: Mapping[str, tuple[torch.Size, torch.dtype]], written: list[_Written]
) -> dict[str, Stored]:
    return {
        name: Stored(
            pieces.name_type(name, dtype),
            tuple(shape),
            tuple(rank.pieces[name] for rank in written if name in rank.pieces),
        )
        for name, (shape, dtype) in shapes.items()
    }


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
        data = memoryview(bytearray(_read_range(store, key, adjacent)))
        for part in adjacent:
            start = part.span.offset - adjacent[0].span.offset
            body = data[start : start + part.span.size]
            if hash_bytes(body) != part.span.sha256:
                raise Corrupt(f"{part.file} does not match a SHA-256, at byte {part.span.offset:,}")
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


def _read_range(store: Store, key: str, adjacent: list[_Bytes]) -> bytes:
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
