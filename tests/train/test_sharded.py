"""Checkpoints of several processes: any number of ranks reads what any other number wrote."""

import contextlib
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import pytest

import sharding
from heliostat.storage import connect
from heliostat.train.reader import read_newest
from sharding import RUN, make_state, same, whole

WRITERS = [(1, "ddp"), (2, "ddp"), (2, "fsdp"), (3, "fsdp")]
READERS = [(1, "ddp"), (2, "ddp"), (2, "fsdp"), (3, "ddp"), (3, "fsdp")]


@pytest.fixture(scope="module")
def pool() -> Iterator[list[Executor]]:
    """A process per rank, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sharding"])
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in range(3)]


@pytest.mark.parametrize("writer", WRITERS, ids=str)
def test_any_ranks_read_bit_for_bit_what_any_other_wrote(
    pool: list[Executor], tmp_path: Path, writer: tuple[int, str]
) -> None:
    root = str(tmp_path / "store")
    world_size, wrap = writer
    place = tmp_path / "writers"
    written = sharding.run(pool, sharding.save_on_ranks, place, world_size, wrap, root)[0]
    for number, (readers, how) in enumerate(READERS):
        place = tmp_path / f"readers-{number}"
        for read in sharding.run(pool, sharding.load_on_ranks, place, readers, how, root):
            assert same(read, written), (readers, how)
    alone = make_state(1)
    assert read_newest(connect(root), RUN, alone) is not None
    assert same(whole(alone), written)


def test_ranks_share_the_writing_of_what_all_have(pool: list[Executor], tmp_path: Path) -> None:
    root = tmp_path / "store"
    sharding.run(pool, sharding.save_on_ranks, tmp_path / "ranks", 2, "ddp", str(root))
    sizes = [path.stat().st_size for path in sorted(root.rglob("rank-*.safetensors"))]
    assert len(sizes) == 2
    assert max(sizes) < 1.5 * min(sizes)


@pytest.mark.parametrize("name", ["rank-00001-000.safetensors", "manifest.json", "COMMITTED"])
def test_damage_that_one_rank_meets_makes_all_fall_back(
    pool: list[Executor], tmp_path: Path, name: str
) -> None:
    place, root = tmp_path / "ranks", str(tmp_path / "store")
    found = sharding.run(pool, sharding.load_damaged, place, 2, root, name)
    assert [step for step, _ in found] == [1, 1]
    assert found[0][1] == found[1][1]
    assert "passing over" in found[0][1]


def test_weights_of_one_rank_that_are_not_finite_are_committed_by_none(
    pool: list[Executor], tmp_path: Path
) -> None:
    told = sharding.run(
        pool, sharding.save_poisoned, tmp_path / "ranks", 2, str(tmp_path / "store")
    )
    assert {sentence for sentence, _ in told} == {
        "model/0.weight has values that are not finite after step 1: lower train.optimizer.lr"
    }
    assert all(left == [] for _, left in told)
