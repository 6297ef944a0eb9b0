"""The largest micro batch that fits, found before the first step by steps that teach nothing."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from heliostat.environment import GIB
from heliostat.errors import HeliostatError
from heliostat.models.example import example
from heliostat.signature import Signature
from heliostat.spec import TrainSpec
from heliostat.train import loop
from heliostat.train.parallel import Parallel
from heliostat.train.room import count_free

# What is left free: for the caches and fragments of the allocator, or for the rest of the machine.
RESERVE = {"cuda": 0.1, "cpu": 0.5}


@dataclass(frozen=True)
class MicroBatch:
    rows: int
    reason: str

    def __str__(self) -> str:
        return f"micro_batch {self.rows} - {self.reason}"


def find_largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n up to `most` that fits, 0 if 1 does not; asks 2 log2(most) + 2 times at most.

    What is smaller than what fits has to fit as well.
    """
    fitting, failing = 0, most + 1
    while failing - fitting > 1:
        doubled = min(max(1, 2 * fitting), most)
        probe = doubled if failing > most else (fitting + failing) // 2
        if fits(probe):
            fitting = probe
        else:
            failing = probe
    return fitting


def foresee(measured: dict[int, int], rows: int) -> int:
    """Bytes of a step of `rows` rows on the line through the two largest that were measured."""
    *_, low, high = sorted(measured)
    slope = (measured[high] - measured[low]) / (high - low)
    return round(measured[high] + slope * (rows - high))


def fit_micro_batch(
    parallel: Parallel,
    optimizer: torch.optim.Optimizer,
    signature: Signature,
    spec: TrainSpec,
    device: torch.device,
    *,
    world_size: int = 1,
    neighbours: int = 1,
) -> MicroBatch:
    """The most rows that a worker can have in flight, up to its share of `spec.global_batch`.

    All workers call it, with an optimiser that has not stepped, and get the same rows; `neighbours`
    are those on this machine, which share its memory. Weights, optimiser, buffers and random state
    are afterwards what they were.

    Raises:
        HeliostatError: one row does not fit.
    """
    there = count_free(device, neighbours)
    limit = there * (1 - RESERVE[device.type])
    measured: dict[int, int] = {}

    def fits(rows: int) -> bool:
        if len(measured) > 1 and not _agree(foresee(measured, rows) <= limit, device, world_size):
            return False
        batch = _make_batch(signature, rows, device, world_size)
        used = _METERS[device.type](lambda: _step(parallel, optimizer, batch, spec, world_size))
        if used is not None:
            measured[rows] = used
        return _agree(used is not None and used <= limit, device, world_size)

    with _undone(parallel.model, optimizer, device):
        most = -(-spec.global_batch // world_size)
        rows = find_largest(fits, most) if fits(0) else 0
    if spec.compile:
        # What was compiled for other sizes would be kept, and be taken for the chosen one too.
        torch.compiler.reset()
    if not rows:
        raise HeliostatError(
            f"train.micro_batch=auto: a step of a single row (the data is "
            f"{signature.input.describe()}) does not fit the {there / GIB:.1f} GiB that are free: "
            "set train.recompute=true or train.strategy=fsdp over more workers, or make the model "
            "smaller"
        )
    share = "a worker's whole share, " if rows == most else ""
    spare = 1 - measured[rows] / there
    return MicroBatch(rows, f"{share}fits {there / GIB:.0f} GiB with {spare:.0%} spare")


def _step(
    parallel: Parallel,
    optimizer: torch.optim.Optimizer,
    batch: loop.Batch,
    spec: TrainSpec,
    world_size: int,
) -> None:
    """A step of the real loop at the learning rate 0, which leaves the weights as they are."""
    recipe = loop.Recipe(lambda _: 0.0, clip_norm=spec.clip_norm, autocast=parallel.autocast)
    ranks = loop.Ranks(world_size=world_size)
    for _ in loop.fit(parallel.model, parallel.task, optimizer, [batch], recipe, ranks=ranks):
        pass


def _make_batch(
    signature: Signature, rows: int, device: torch.device, world_size: int
) -> loop.Batch:
    inputs, targets = example(signature, rows)
    on_device = tuple(tensor.to(device) for tensor in inputs)
    total = rows * world_size
    return loop.Batch(on_device, targets.to(device), 0, total, weight=max(total, 1))


@contextlib.contextmanager
def _undone(
    model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> Iterator[None]:
    """Afterwards the optimiser is fresh again, and the buffers and random state are as before."""
    assert not optimizer.state
    rates = [group["lr"] for group in optimizer.param_groups]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for buffer, kept in buffers:
            buffer.copy_(kept)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _agree(fits: bool, device: torch.device, world_size: int) -> bool:
    """Whether it fits everywhere; every worker then goes on in the same way."""
    if world_size == 1:
        return fits
    least = torch.tensor(int(fits), device=device)
    distributed.all_reduce(least, distributed.ReduceOp.MIN)
    return bool(least.item())


def _measure_cuda(step: Callable[[], None]) -> int | None:
    """Bytes that PyTorch took of the GPU at most, None if there were not enough."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        step()
    except torch.cuda.OutOfMemoryError:
        return None
    return int(torch.cuda.max_memory_reserved())


def _measure_cpu(step: Callable[[], None]) -> int | None:
    """Bytes of the tensors that were made and alive together at most."""
    meter = _Meter()
    with meter:
        step()
    return int(meter.peak_bytes)


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storage of every tensor that an operation makes, until it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bytes: dict[int, int] = {}
        self._live_bytes = self.peak_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._follow(leaf.to_local() if isinstance(leaf, DTensor) else leaf)
        return made

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._bytes:
            return
        self._bytes[key] = storage.nbytes()
        self._live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._live_bytes -= self._bytes.pop(key)


_METERS = {"cuda": _measure_cuda, "cpu": _measure_cpu}
