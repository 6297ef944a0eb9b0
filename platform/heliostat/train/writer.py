"""A run's state to a checkpoint in the bucket: each rank its part, in the background.

The planners of torch.distributed.checkpoint decide which rank writes which part of which tensor;
here the bytes are moved, without pickle.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan

from heliostat.errors import HeliostatError
from heliostat.storage import Store
from heliostat.train import checkpoint, pieces
from heliostat.train.checkpoint import File, Manifest, Piece, Retention, Stored
from heliostat.train.lease import Fence
from heliostat.train.peers import Peers, open_peers
from heliostat.train.state import OPTIMIZER, State, name_tensors, take_local

FILE_BYTES = 128 * 1024**2  # held in memory while it is uploaded
PARALLEL_WRITES = 4


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint: how long the writing took after `begin`, and what this rank wrote."""

    key: str
    step: int
    seconds: float
    written_bytes: int


class Writer:
    """Writes checkpoints of a run while it goes on; every rank has one and calls it alike.

    `saved` is the newest that was committed. With a `fence` on rank 0, a writer that another has
    followed commits nothing any more.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        retention: Retention,
        *,
        fence: Fence | None = None,
    ) -> None:
        self.saved: Saved | None = None
        self._store, self._run, self._retention = store, run, retention
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
        _try(lambda: checkpoint.retain(self._store, self._run, self._retention))


def _try(act: Callable[[], None]) -> None:
    """Cleaning up may fail: the next checkpoint, or a resumption, cleans up again."""
    with contextlib.suppress(HeliostatError):
        act()


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
