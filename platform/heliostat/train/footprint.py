"""The memory of a training step, found on tensors that have shapes and no values: no device."""

from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from heliostat.errors import HeliostatError
from heliostat.models import Task, build, task_of
from heliostat.models.dropout import find_dropouts
from heliostat.models.example import example
from heliostat.plan.memory import Footprint, Line, envelope
from heliostat.signature import Signature
from heliostat.spec import CustomSpec, ModelSpec, RnnSpec, TrainSpec
from heliostat.train import loop
from heliostat.train.follower import Follower, key_of
from heliostat.train.optim import build_optimizer
from heliostat.train.parallel import LOW_PRECISION, find_blocks, recompute

ROWS = (2, 3)  # one more, so that the difference is that of a row

# The bytes alive after each operation of a step: gradients, casts of weights, and other.
Moments = list[dict[str, int]]


def measure_footprint(model: ModelSpec, signature: Signature, train: TrainSpec) -> Footprint:
    """What one worker keeps in a step of `train` for any number of rows of the full length.

    Steps of different size run the same operations, so that each moment of them is a line over
    rows. Packed series are read by their lengths: an `rnn` makes its few steps on real tensors.

    Raises:
        HeliostatError: the family does not suit the data, or a user's own network looks at values.
    """
    try:
        with nullcontext() if isinstance(model, RnnSpec) else FakeTensorMode():
            return _measure(build(model, signature), task_of(model, signature), signature, train)
    except (NotImplementedError, RuntimeError, DataDependentOutputException) as error:
        if not isinstance(model, CustomSpec):
            raise
        raise HeliostatError(
            f"the memory of model.build={model.build} cannot be planned, its network looks at the "
            f"values of tensors: {error}"
        ) from error


def _measure(network: nn.Module, task: Task, signature: Signature, train: TrainSpec) -> Footprint:
    optimizer = build_optimizer(train.optimizer, network)
    if train.recompute:
        recompute(network)

    def run(rows: int) -> _Log:
        log = _Log(network)
        with log.follower:
            optimizer.zero_grad(set_to_none=True)
            _accumulate(network, task, signature, train, rows)
            loop.clip(network.parameters(), train.clip_norm)
            optimizer.step()
        log.sort()
        return log

    run(ROWS[0])  # after it the optimiser has what it keeps
    logs = [run(rows) for rows in ROWS]
    few, more = (log.moments for log in logs)
    blocks = [_count(block.parameters()) for block in find_blocks(network)]
    weights = _count(network.parameters())
    return Footprint(
        weights=weights + _count(network.buffers()),
        gradients=_count(p for p in network.parameters() if p.requires_grad),
        average=_count(network.parameters()) if train.ema else 0,
        optimizer=_count(t for state in optimizer.state.values() for t in state.values()),
        largest_block=max(blocks, default=0),
        outside_blocks=weights - sum(blocks),
        kernels=logs[0].kernels,
        together=_draw(few, more, ()),
        working=_draw(few, more, ("gradient",)),
        sharded=_draw(few, more, ("gradient", "cast")),
    )


def _accumulate(
    network: nn.Module, task: Task, signature: Signature, train: TrainSpec, rows: int
) -> None:
    """What `loop.fit` does with one micro batch, but for reading numbers."""
    inputs, targets = example(signature, rows)
    batch = loop.Batch(inputs, targets, 0, rows, rows)
    dtype = LOW_PRECISION.get(train.precision)
    with loop.key(find_dropouts(network), train.seed, 1, batch)(slice(0, rows)):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            outputs = network(*inputs)
            measured = loop.measure(task, outputs, targets)
        torch.autograd.backward(measured["loss"] / (rows * task.units))


class _Log:
    """Writes down what is made and freed, and after which operation that makes something.

    Those are its `kernels`; views are none.
    """

    def __init__(self, network: nn.Module) -> None:
        self.follower = Follower(self._made, self._freed)
        self._network = network
        self._weights = {key_of(parameter) for parameter in network.parameters()}
        self._casts = set[int]()
        self._changes: list[tuple[int, int]] = []
        self._operations: list[int] = []
        self.moments: Moments = []

    @property
    def kernels(self) -> int:
        return len(self._operations)

    def _made(self, number: int, size: int, func: Any, args: tuple[Any, ...]) -> None:
        if func is torch.ops.aten._to_copy.default and key_of(args[0]) in self._weights:
            self._casts.add(number)
        self._changes.append((number, size))
        self._operations.append(len(self._changes))

    def _freed(self, number: int, size: int) -> None:
        self._changes.append((number, -size))

    def sort(self) -> None:
        """Sum up by kind what was alive after each operation, while the gradients are there."""
        gradients = {
            self.follower.number_of(p.grad)
            for p in self._network.parameters()
            if p.grad is not None
        }
        kinds: dict[int | None, str] = dict.fromkeys(self._casts, "cast")
        kinds |= dict.fromkeys(gradients, "gradient")
        alive, place = Counter[str](), 0
        for end in self._operations:
            for number, size in self._changes[place:end]:
                alive[kinds.get(number, "other")] += size
            place = end
            self.moments.append(dict(alive))


def _draw(few: Moments, more: Moments, without: tuple[str, ...]) -> tuple[Line, ...]:
    """The bytes of each moment as a line over rows, of all kinds but these; the highest lines.

    Where more rows take other operations the line is that of the highest moments.
    """
    lows, highs = (
        [sum(size for kind, size in moment.items() if kind not in without) for moment in moments]
        for moments in (few, more)
    )
    if len(lows) != len(highs):
        lows, highs = [max(lows)], [max(highs)]
    slopes = ((low, max(0, high - low)) for low, high in zip(lows, highs, strict=True))
    return envelope(Line(low - ROWS[0] * slope, slope) for low, slope in slopes)


def _count(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
