"""What is applied from outside changes how a network is trained, never what it learns."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import strategies
from heliostat.errors import HeliostatError
from heliostat.spec import TrainSpec
from heliostat.train.parallel import parallelize
from strategies import Case

NETWORKS, STRATEGIES, PRECISIONS = ("mlp", "deep"), ("ddp", "fsdp"), ("fp32", "bf16", "fp16")
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 3e-3}
EITHER = (False, True)

ALONE = [
    Case(network, "ddp", precision, recompute, False, 1)
    for network, precision, recompute in itertools.product(NETWORKS, PRECISIONS, EITHER)
]
# The largest group first: who is not in the next one is done.
TOGETHER = [
    *(
        Case(network, strategy, precision, recompute, False, 3)
        for network, strategy, precision, recompute in itertools.product(
            NETWORKS, STRATEGIES, PRECISIONS, EITHER
        )
    ),
    *(
        Case("deep", strategy, precision, True, False, 2)
        for strategy, precision in itertools.product(STRATEGIES, PRECISIONS)
    ),
    Case("deep", "ddp", "fp32", False, True, 2),
    Case("deep", "fsdp", "bf16", True, True, 2),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of several processes on few cores wait for one another at every operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plain() -> dict[str, list[strategies.Step]]:
    return {network: strategies.train_plainly(network) for network in NETWORKS}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[strategies.Seen]:
    return strategies.train_together(TOGETHER, tmp_path_factory.mktemp("ranks"))


def assert_same(case: Case, seen: list[strategies.Step], plain: list[strategies.Step]) -> None:
    tolerance = TOLERANCE[case.precision]
    torch.testing.assert_close(seen, plain, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("case", TOGETHER, ids=str)
def test_workers_learn_what_one_process_learns(
    case: Case,
    seen: list[strategies.Seen],
    plain: dict[str, list[strategies.Step]],
) -> None:
    for rank in seen[: case.world_size]:
        assert_same(case, [tuple(step) for step in rank[str(case)]], plain[case.network])


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_one_process_learns_the_same_by_every_name(
    case: Case, plain: dict[str, list[strategies.Step]]
) -> None:
    assert_same(case, strategies.train_case(case), plain[case.network])


def test_workers_with_different_room_take_the_micro_batch_that_fits_all(
    seen: list[strategies.Seen],
) -> None:
    rows = [rank["rows"] for rank in seen]
    assert rows == [rows[0]] * 3
    assert 1 <= rows[0] < strategies.search(strategies.ROOM_BYTES)


def test_a_gradient_that_overflows_on_one_worker_is_skipped_by_all(
    seen: list[strategies.Seen],
) -> None:
    assert [tuple(rank["overflow"]) for rank in seen] == [(0.0, 2.0)] * 3


@pytest.mark.parametrize("network", NETWORKS)
def test_nothing_that_is_applied_renames_a_parameter(network: str) -> None:
    model = strategies.make_network(network)
    names = list(model.state_dict())
    spec = TrainSpec(recompute=True, compile=True, precision="bf16")
    parallelize(model, strategies.TASK, spec, strategies.CPU)
    assert list(model.state_dict()) == names


def test_a_worker_without_a_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(HeliostatError, match="has no no-such-compiler: install one"):
        parallelize(nn.Linear(2, 2), strategies.TASK, TrainSpec(compile=True), torch.device("cpu"))
