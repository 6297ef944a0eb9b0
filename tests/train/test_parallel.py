"""What is applied from outside changes how a network is trained, never what it learns."""

import itertools
from collections.abc import Iterator

import pytest
import torch

import strategies
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
def plain() -> dict[str, list[tuple[float, float]]]:
    return {network: strategies.train_plainly(network) for network in NETWORKS}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[float, float]]]:
    return strategies.train_together(TOGETHER, tmp_path_factory.mktemp("ranks"))


def assert_same(
    case: Case, seen: list[tuple[float, float]], plain: list[tuple[float, float]]
) -> None:
    tolerance = TOLERANCE[case.precision]
    torch.testing.assert_close(seen, plain, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("case", TOGETHER, ids=str)
def test_workers_learn_what_one_process_learns(
    case: Case,
    seen: dict[str, list[list[float]]],
    plain: dict[str, list[tuple[float, float]]],
) -> None:
    assert_same(case, [(loss, norm) for loss, norm in seen[str(case)]], plain[case.network])


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_one_process_learns_the_same_by_every_name(
    case: Case, plain: dict[str, list[tuple[float, float]]]
) -> None:
    assert_same(case, strategies.train_case(case), plain[case.network])
