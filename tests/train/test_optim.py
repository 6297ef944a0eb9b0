"""Optimisers by name, and the laws of the learning rate."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from heliostat.spec import OptimizerSpec, ScheduleSpec
from heliostat.train.optim import build_optimizer, rate_at

KINDS = ("constant", "step", "linear", "cosine", "wsd", "plateau")
schedules = st.builds(
    ScheduleSpec,
    kind=st.sampled_from(KINDS),
    warmup_steps=st.integers(0, 50),
    every=st.integers(1, 50),
    factor=st.floats(0.01, 0.99),
    final=st.floats(0, 1),
    decay_steps=st.integers(1, 100),
)


@given(schedules, st.integers(1, 200))
def test_a_rate_rises_to_one_and_then_never_rises(spec: ScheduleSpec, steps: int) -> None:
    rates = [rate_at(spec, step, steps) for step in range(1, steps + 1)]
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    peak = min(spec.warmup_steps, steps)
    for step in range(1, peak):
        assert rates[step] > rates[step - 1]
    for step in range(max(peak, 1), steps):
        assert rates[step] <= rates[step - 1] + 1e-12


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_a_rate_ends_where_it_should(kind: str) -> None:
    spec = ScheduleSpec.model_validate(
        {"kind": kind, "warmup_steps": 10, "final": 0.1, "decay_steps": 20}
    )
    assert rate_at(spec, 100, 100) == pytest.approx(0.1)
    assert rate_at(spec, 10, 100) == 1
    half = {"linear": 0.55, "cosine": 0.55, "wsd": 1.0}[kind]
    assert rate_at(spec, 55, 100) == pytest.approx(half)


def test_a_run_that_is_shorter_than_its_decay_ends_where_it_should_too() -> None:
    spec = ScheduleSpec(kind="wsd", warmup_steps=10, decay_steps=1000)
    rates = [rate_at(spec, step, 200) for step in range(10, 201)]
    assert (rates[0], rates[-1]) == (1, 0)
    assert all(before > after for before, after in pairwise(rates))


def test_steps_are_those_of_pytorch() -> None:
    spec = ScheduleSpec(kind="step", every=3, factor=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.1)
    for step in range(1, 20):
        assert rate_at(spec, step, 100) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_steps_and_plateaus_multiply() -> None:
    stepped = ScheduleSpec(kind="step", every=10, factor=0.5)
    assert [rate_at(stepped, step, 100) for step in (1, 10, 11, 25)] == [1, 1, 0.5, 0.25]
    assert rate_at(ScheduleSpec(kind="plateau", factor=0.5), 7, 100, drops=3) == 0.125


@pytest.mark.parametrize("kind", ["sgd", "rmsprop", "adam", "adamw"])
def test_matrices_are_decayed_and_biases_are_not(kind: str) -> None:
    model = nn.Linear(3, 2)
    spec = OptimizerSpec.model_validate({"kind": kind, "weight_decay": 0.5, "decay": "matrices"})
    optimizer = build_optimizer(spec, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    assert torch.equal(model.bias, before["bias"])
    assert model.weight.abs().sum() < before["weight"].abs().sum()
