"""The training loop, in PyTorch alone: batches in, one report a step out."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from heliostat.errors import HeliostatError
from heliostat.models import Task
from heliostat.models.dropout import Dropout, find_dropouts, key_samples, mix
from heliostat.train.optim import set_rate
from heliostat.train.parallel import Autocast, backward, synced

Keyed = Callable[[slice], AbstractContextManager[None]]


@dataclass(frozen=True)
class Ranks:
    """Which of how many data-parallel workers this is."""

    rank: int = 0
    world_size: int = 1


ALONE = Ranks()


@dataclass(frozen=True)
class Batch:
    """This rank's share of a global batch; the share may be empty.

    `first_row` is where it begins in the global batch, which has `rows` rows that weigh `weight`.
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor
    first_row: int
    rows: int
    weight: int


@dataclass(frozen=True)
class Recipe:
    """How a step is made: `rate` is the learning rate by step, `micro_batch` rows at a time.

    `ask` is called once a step on each rank and its numbers are summed over all: so that all act at
    the same step on what one of them saw.
    """

    rate: Callable[[int], float]
    seed: int = 0
    micro_batch: int | None = None
    clip_norm: float | None = None
    autocast: Autocast = contextlib.nullcontext
    scaler: torch.amp.GradScaler = field(
        default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False)
    )
    ask: Callable[[], tuple[float, ...]] = tuple


@dataclass(frozen=True)
class StepReport:
    """One finished step over all ranks: `metrics` are means over the global batch, `loss` first.

    `seconds` is the wall time since it was asked for, `wait_seconds` the part spent on its batch.
    `votes` are the sums of what each rank was asked by the recipe.
    """

    step: int
    rows: int
    weight: int
    metrics: dict[str, float]
    grad_norm: float
    rate: float
    seconds: float
    wait_seconds: float
    votes: tuple[float, ...] = ()


def fit(
    model: nn.Module,
    task: Task,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    recipe: Recipe,
    *,
    first_step: int = 0,
    ranks: Ranks = ALONE,
) -> Iterator[StepReport]:
    """Train on `batches`, one optimiser step each, and report after each.

    The gradient is that of the mean over the global batch, however unevenly ranks and micro batches
    share it: each weights its sum by world_size / weight, and data parallel averages over ranks.

    Raises:
        HeliostatError: the loss or the gradient is NaN or infinite; the optimiser has not stepped.
    """
    dropouts = find_dropouts(model)
    trained = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    began = time.perf_counter()
    for step, batch in enumerate(batches, start=first_step + 1):
        received = time.perf_counter()
        if not model.training:  # costs a small network a fiftieth of its step
            model.train()
        set_rate(optimizer, rate := recipe.rate(step))
        optimizer.zero_grad(set_to_none=True)
        keyed = key(dropouts, recipe.seed, step, batch)
        collect = _accumulate(model, task, batch, recipe, keyed, ranks)
        recipe.scaler.unscale_(optimizer)
        grad_norm = float(clip(trained, recipe.clip_norm))
        totals, votes = collect()
        means = {name: total / (batch.weight * task.units) for name, total in totals.items()}
        _check(step, means["loss"], grad_norm, recipe)
        recipe.scaler.step(optimizer)
        recipe.scaler.update()
        ended = time.perf_counter()
        yield StepReport(
            step,
            batch.rows,
            batch.weight,
            means,
            grad_norm,
            rate,
            seconds=ended - began,
            wait_seconds=received - began,
            votes=votes,
        )
        began = time.perf_counter()


@torch.no_grad()
def validate(
    model: nn.Module,
    task: Task,
    batches: Iterable[Batch],
    recipe: Recipe,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Means of the loss and of what `task` counts over the batches of all ranks.

    Here a batch is a rank's own and `weight` that of its rows; every rank has as many batches.
    """
    model.eval()
    sums: list[dict[str, Tensor]] = []
    weight = 0
    for batch in batches:
        with recipe.autocast():
            outputs = model(*batch.inputs)
            sums.append(measure(task, outputs, batch.targets))
        weight += batch.weight * task.units
    totals = torch.stack([sum(parts).double() for parts in _columns(sums)])
    totals = torch.cat([totals, totals.new_tensor([weight])])
    if ranks.world_size > 1:
        distributed.all_reduce(totals)
    *values, whole = totals.tolist()
    return {name: value / max(whole, 1) for name, value in zip(sums[0], values, strict=True)}


def _accumulate(
    model: nn.Module,
    task: Task,
    batch: Batch,
    recipe: Recipe,
    keyed: Keyed,
    ranks: Ranks,
) -> Callable[[], tuple[dict[str, float], tuple[float, ...]]]:
    """Forward and backward over all micro batches; how to get the sums and votes of all ranks.

    The sums travel while the backward pass runs. Every rank makes as many micro batches as the one
    with the most rows, else collectives of the model would wait for ever.
    """
    most_rows = -(-batch.rows // ranks.world_size)
    size = recipe.micro_batch or max(most_rows, 1)
    scale = ranks.world_size / (batch.weight * task.units)
    sums: list[dict[str, Tensor]] = []
    starts = range(0, max(most_rows, 1), size)
    for start in starts:
        rows = slice(start, start + size)
        last = start == starts[-1]
        with synced(model, last), keyed(rows):
            with recipe.autocast():
                outputs = model(*(tensor[rows] for tensor in batch.inputs))
                measured = measure(task, outputs, batch.targets[rows])
            sums.append({name: total.detach() for name, total in measured.items()})
            loss = recipe.scaler.scale(measured["loss"] * scale)
            if last:
                totals = torch.stack([sum(parts).double() for parts in _columns(sums)])
                totals = torch.cat([totals, totals.new_tensor(recipe.ask())])
                receive = backward(model, loss, totals, ranks.world_size)
            else:
                torch.autograd.backward(loss)

    def collect() -> tuple[dict[str, float], tuple[float, ...]]:
        values = receive()
        return dict(zip(sums[0], values, strict=False)), tuple(values[len(sums[0]) :])

    return collect


def measure(task: Task, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    loss = task.loss(outputs, targets)
    with torch.no_grad():
        return {"loss": loss, **task.count(outputs, targets)}


def _columns(sums: list[dict[str, Tensor]]) -> Iterator[Any]:
    return zip(*(part.values() for part in sums), strict=True)


def key(dropouts: Sequence[Dropout], seed: int, step: int, batch: Batch) -> Keyed:
    """What gives each of these rows of the share a number that says what is drawn for it."""
    if not dropouts:
        return lambda rows: contextlib.nullcontext()
    places = torch.arange(len(batch.targets), device=batch.targets.device) + batch.first_row
    keys = mix(mix(torch.tensor(seed ^ (step << 32) & 2**63 - 1)) + places)
    return lambda rows: key_samples(dropouts, keys[rows])


def clip(trained: Iterable[Tensor], most: float | None) -> Tensor:
    """The norm of the gradient before it was clipped to `most`."""
    parameters = [p for p in trained if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if most is not None:
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


def _check(step: int, loss: float, grad_norm: float, recipe: Recipe) -> None:
    """Refuse to step on what is not finite; under a scaler a gradient may overflow, it skips."""
    advice = "lower train.optimizer.lr or look for extreme values in the data"
    if not math.isfinite(loss):
        raise HeliostatError(f"the loss became {loss} at step {step}: {advice}")
    if not math.isfinite(grad_norm) and not recipe.scaler.is_enabled():
        raise HeliostatError(
            f"the norm of the gradient became {grad_norm} at step {step}: set train.clip_norm, "
            f"{advice}"
        )
