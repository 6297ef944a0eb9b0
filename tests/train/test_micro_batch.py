"""The largest micro batch is found in few probes, and nothing of the search is left behind."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heliostat.errors import HeliostatError
from heliostat.models import build, task_of
from heliostat.models.example import example
from heliostat.signature import (
    Blocks,
    Classes,
    Input,
    Interaction,
    NextToken,
    Numbers,
    Output,
    Picture,
    Series,
    Signature,
    Text,
    Vector,
)
from heliostat.spec import MlpSpec, OptimizerSpec, TrainSpec
from heliostat.train import micro_batch, room
from heliostat.train.micro_batch import find_largest, fit_micro_batch, foresee
from heliostat.train.optim import build_optimizer
from heliostat.train.parallel import Parallel, parallelize

CPU = torch.device("cpu")
WIDTH, HIDDEN = 400, 200
TWO = Classes(("a", "b"))
WIDE = Signature(Vector(WIDTH), TWO)
MLP = MlpSpec(kind="mlp", hidden=(HIDDEN,))
SPEC = TrainSpec(global_batch=64, micro_batch="auto")


@given(st.integers(1, 10_000), st.integers(0, 12_000))
def test_the_largest_that_fits_is_found_in_few_probes(most: int, room: int) -> None:
    probes: list[int] = []

    def fits(rows: int) -> bool:
        probes.append(rows)
        return rows <= room

    assert find_largest(fits, most) == min(most, room)
    assert len(probes) == len(set(probes)) <= 2 * math.log2(most) + 2


@given(st.integers(0, 10**12), st.integers(1, 10**9), st.integers(3, 10**5))
def test_a_step_is_foreseen_on_the_line_through_the_measured(
    fixed: int, each: int, rows: int
) -> None:
    measured = {known: fixed + each * known for known in (0, 1, 2)}
    assert foresee(measured, rows) == pytest.approx(fixed + each * rows, rel=1e-9)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize(
    ("shape", "output", "inputs"),
    [
        (Vector(5), TWO, [(5,)]),
        (Picture(3, 8, 6), TWO, [(3, 8, 6)]),
        (Series(7, 2), Numbers(("x", "y"), (0.0, 0.0), (1.0, 1.0)), [(7, 2), ()]),
        (Text(9, 50), TWO, [(9,), ()]),
        (Blocks(16, 50, end=49), NextToken(), [(16,)]),
        (Interaction((10, 20), 4), Numbers(("x",), (0.0,), (1.0,)), [(2,), (4,)]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_example_has_the_rows_and_shapes_of_its_signature(
    shape: Input, output: Output, inputs: list[tuple[int, ...]], rows: int
) -> None:
    tensors, targets = example(Signature(shape, output), rows)
    assert [tuple(tensor.shape) for tensor in tensors] == [(rows, *size) for size in inputs]
    assert len(targets) == rows


def make(spec: TrainSpec = SPEC) -> tuple[Parallel, torch.optim.Optimizer]:
    torch.manual_seed(0)
    parallel = parallelize(build(MLP, WIDE), task_of(MLP, WIDE), spec, CPU)
    optimizer = build_optimizer(OptimizerSpec(kind="adamw", weight_decay=0.1), parallel.model)
    return parallel, optimizer


def test_the_search_leaves_weights_optimiser_and_random_state_as_they_were() -> None:
    parallel, optimizer = make()
    weights = {name: tensor.clone() for name, tensor in parallel.model.state_dict().items()}
    settings, random = optimizer.state_dict(), torch.random.get_rng_state()
    found = fit_micro_batch(parallel, optimizer, WIDE, SPEC, CPU)
    assert found.rows == 64
    assert str(found).startswith("micro_batch 64 - a worker's whole share, fits ")
    after = parallel.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights.items())
    assert all(parameter.grad is None for parameter in parallel.model.parameters())
    assert optimizer.state_dict() == settings
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize("room_bytes", [3 * 10**6, 10**7])
def test_a_micro_batch_takes_no_more_than_is_free(
    room_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In AdamW a weight has a gradient and two moments; a row keeps its hidden layer, twice."""
    spec = SPEC.model_copy(update={"global_batch": 4096})
    parallel, optimizer = make(spec)
    monkeypatch.setitem(room._AVAILABLE, "cpu", lambda device: room_bytes)
    found = fit_micro_batch(parallel, optimizer, WIDE, spec, CPU)
    free_bytes = room_bytes * (1 - micro_batch.RESERVE["cpu"]) - 3 * 4 * WIDTH * HIDDEN
    row_bytes = 4 * 2 * HIDDEN
    assert 0.4 * free_bytes / row_bytes <= found.rows <= free_bytes / row_bytes


def test_one_row_that_does_not_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(room._AVAILABLE, "cpu", lambda device: 10**5)
    with pytest.raises(HeliostatError, match=r"rows of 400 numbers\) does not fit the 0.0 GiB"):
        fit_micro_batch(*make(), WIDE, SPEC, CPU)
