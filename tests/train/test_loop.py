"""The loop: gradients of the global batch however it is shared, resumption, divergence."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from heliostat.errors import HeliostatError
from heliostat.models import Task, build, task_of
from heliostat.signature import Classes, Numbers, Output, Signature, Vector
from heliostat.spec import MlpSpec, OptimizerSpec
from heliostat.storage import connect
from heliostat.train import loop
from heliostat.train.checkpoint import Retention
from heliostat.train.optim import build_optimizer
from heliostat.train.reader import read_newest
from heliostat.train.state import State, name_tensors
from heliostat.train.writer import Writer

SPEC = MlpSpec(kind="mlp", hidden=(16,), dropout=0.2)
SIGNATURE = Signature(Vector(6), Classes(("a", "b", "c")))
TASK = task_of(SPEC, SIGNATURE)
RECIPE = loop.Recipe(rate=lambda step: 0.05)
OPTIMIZERS = [
    OptimizerSpec(kind="sgd", momentum=0.9, nesterov=True),
    OptimizerSpec(kind="rmsprop", momentum=0.5),
    OptimizerSpec(kind="adam"),
    OptimizerSpec(kind="adamw", weight_decay=0.1, decay="matrices"),
]


def make(optimizer: OptimizerSpec) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = build(SPEC, SIGNATURE)
    return model, build_optimizer(optimizer, model)


def batches(steps: range) -> Iterator[loop.Batch]:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        rows = 5 + step % 3
        inputs = torch.randn(rows, 6, generator=generator)
        yield batch(inputs, torch.randint(0, 3, (rows,), generator=generator))


def batch(inputs: torch.Tensor, targets: torch.Tensor) -> loop.Batch:
    return loop.Batch((inputs,), targets, 0, len(inputs), len(inputs))


def outcome(reports: list[loop.StepReport]) -> list[loop.StepReport]:
    """What of the reports is a function of the inputs."""
    return [replace(report, seconds=0.0, wait_seconds=0.0) for report in reports]


def copy(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in name_tensors(State(model, optimizer)).items()}


def check_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda spec: spec.kind)
def test_a_resumed_run_equals_an_undisturbed_one(optimizer: OptimizerSpec, tmp_path: Path) -> None:
    model, whole_state = make(optimizer)
    whole = list(loop.fit(model, TASK, whole_state, batches(range(20)), RECIPE))

    first, first_state = make(optimizer)
    list(loop.fit(first, TASK, first_state, batches(range(11)), RECIPE))
    store = connect(str(tmp_path))
    writer = Writer(store, "run", Retention(keep=2))
    writer.begin(11, State(first, first_state), {})
    writer.finish()
    resumed, resumed_state = make(optimizer)
    found = read_newest(store, "run", State(resumed, resumed_state))
    assert found is not None
    rest = loop.fit(resumed, TASK, resumed_state, batches(range(11, 20)), RECIPE, first_step=11)

    assert outcome(list(rest)) == outcome(whole[found.step :])
    check_equal(copy(resumed, resumed_state), copy(model, whole_state))


TASKS: dict[str, tuple[Output, torch.Tensor]] = {
    "classification": (Classes(("a", "b", "c")), torch.arange(7) % 3),
    "regression": (Numbers(("y", "z"), (0.0, 0.0), (1.0, 1.0)), torch.arange(14.0).view(7, 2)),
}


@pytest.mark.parametrize("name", TASKS)
def test_shares_of_any_size_add_up_to_the_gradient_of_the_batch(name: str) -> None:
    """Data parallel averages gradients over ranks; the weights of the ranks must undo that."""
    output, targets = TASKS[name]
    signature = Signature(Vector(6), output)
    spec = MlpSpec(kind="mlp", hidden=(16,), dropout=0.3)
    inputs, model, task = torch.randn(7, 6), build(spec, signature), task_of(spec, signature)
    whole = gradient(model, task, loop.Batch((inputs,), targets, 0, 7, 7))
    parts = [
        gradient(model, task, loop.Batch((inputs[rows],), targets[rows], rows.start, 7, 7))
        for rows in (slice(0, 4), slice(4, 7), slice(7, 7))
    ]
    torch.testing.assert_close(sum(parts, torch.zeros(())), whole)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_micro_batches_of_any_size_give_the_same_step(size: int) -> None:
    def train(micro_batch: int | None) -> list[loop.StepReport]:
        model, optimizer = make(OPTIMIZERS[0])
        recipe = replace(RECIPE, micro_batch=micro_batch, clip_norm=0.5)
        return list(loop.fit(model, TASK, optimizer, batches(range(5)), recipe))

    for small, whole in zip(train(size), train(None), strict=True):
        assert small.metrics == pytest.approx(whole.metrics)
        assert small.grad_norm == pytest.approx(whole.grad_norm)


def gradient(model: nn.Module, task: Task, given: loop.Batch) -> torch.Tensor:
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    next(loop.fit(model, task, sgd, [given], loop.Recipe(rate=lambda step: 0.0)))
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_a_clipped_gradient_has_the_norm_it_may_have() -> None:
    model, optimizer = make(OPTIMIZERS[0])
    recipe = replace(RECIPE, clip_norm=0.01)
    report = next(loop.fit(model, TASK, optimizer, batches(range(1)), recipe))
    kept = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert report.grad_norm > 0.01
    assert kept.norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("poison", "said"),
    [(float("nan"), "the loss became nan at step 2"), (1e30, "gradient became inf at step 2")],
)
def test_what_is_not_finite_stops_at_its_step_and_leaves_the_weights(
    poison: float, said: str
) -> None:
    model, optimizer = make(OPTIMIZERS[0])
    good, bad = batches(range(2))
    steps = loop.fit(
        model, TASK, optimizer, [good, batch(bad.inputs[0] * poison, bad.targets)], RECIPE
    )
    next(steps)
    before = copy(model, optimizer)
    with pytest.raises(HeliostatError, match=said):
        next(steps)
    check_equal(copy(model, optimizer), before)


def test_validation_is_the_mean_however_it_is_batched() -> None:
    model, _ = make(OPTIMIZERS[0])
    inputs, targets = torch.randn(10, 6), torch.arange(10) % 3
    whole = loop.validate(model, TASK, [batch(inputs, targets)], RECIPE)
    parts = [batch(inputs[:3], targets[:3]), batch(inputs[3:], targets[3:])]
    assert loop.validate(model, TASK, parts, RECIPE) == pytest.approx(whole)
    assert set(whole) == {"loss", "accuracy"}
