"""The loop: gradients of the global batch however it is shared, resumption, divergence."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from heliostat.errors import HeliostatError
from heliostat.models import build
from heliostat.spec import MlpSpec, OptimizerSpec
from heliostat.train import loop

SPEC = MlpSpec(kind="mlp", hidden=(16,), dropout=0.2)
OPTIMIZERS = [
    OptimizerSpec(kind="sgd", lr=0.05, momentum=0.9),
    OptimizerSpec(kind="adam", lr=0.01),
    OptimizerSpec(kind="adamw", lr=0.01, weight_decay=0.1),
]


def make(optimizer: OptimizerSpec) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = build(SPEC, (6,), 3)
    return model, loop.build_optimizer(optimizer, model)


def batches(steps: range) -> Iterator[loop.Batch]:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        rows = 5 + step % 3
        inputs = torch.randn(rows, 6, generator=generator)
        yield loop.Batch(inputs, torch.randint(0, 3, (rows,), generator=generator), rows)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda spec: spec.kind)
def test_a_resumed_run_equals_an_undisturbed_one(optimizer: OptimizerSpec) -> None:
    model, state = make(optimizer)
    whole = list(loop.fit(model, state, batches(range(20))))

    first, first_state = make(optimizer)
    list(loop.fit(first, first_state, batches(range(11))))
    files = loop.dump_state(first, first_state, 11)
    resumed, resumed_state = make(optimizer)
    step = loop.load_state(resumed, resumed_state, files)
    rest = list(loop.fit(resumed, resumed_state, batches(range(step, 20)), first_step=step))

    assert rest == whole[11:]
    assert loop.dump_state(resumed, resumed_state, 20) == loop.dump_state(model, state, 20)


def test_shares_of_any_size_add_up_to_the_gradient_of_the_batch() -> None:
    """Data parallel averages gradients over ranks; the weights of the ranks must undo that."""
    inputs, targets = torch.randn(7, 6), torch.arange(7) % 3
    model = build(MlpSpec(kind="mlp", hidden=(16,)), (6,), 3)

    def gradient(rows: slice, world_size: int) -> torch.Tensor:
        sgd = torch.optim.SGD(model.parameters(), lr=0.0)
        batch = loop.Batch(inputs[rows], targets[rows], 7)
        steps = loop.fit(model, sgd, [batch], world_size=1, rank=0)
        next(steps)
        flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return flat * world_size

    whole = gradient(slice(0, 7), 1)
    parts = [gradient(rows, 3) for rows in (slice(0, 4), slice(4, 7), slice(7, 7))]
    torch.testing.assert_close(sum(parts, torch.zeros(())) / 3, whole)


def test_a_loss_that_is_not_a_number_stops_at_its_step_and_leaves_the_weights() -> None:
    model, optimizer = make(OPTIMIZERS[0])
    good, bad = batches(range(2))
    poisoned = loop.Batch(bad.inputs.fill_(float("nan")), bad.targets, bad.global_rows)
    steps = loop.fit(model, optimizer, [good, poisoned])
    next(steps)
    before = loop.dump_state(model, optimizer, 1)
    with pytest.raises(HeliostatError, match="loss became nan at step 2"):
        next(steps)
    assert loop.dump_state(model, optimizer, 1) == before


def test_weights_that_are_not_finite_are_never_written() -> None:
    model, optimizer = make(OPTIMIZERS[0])
    with torch.no_grad():
        next(model.parameters())[0] = float("inf")
    with pytest.raises(HeliostatError, match="not finite after step 9"):
        loop.dump_state(model, optimizer, 9)
