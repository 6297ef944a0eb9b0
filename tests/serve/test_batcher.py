"""Every request gets the answer to its own rows, whoever it is computed with."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from heliostat.serve.batcher import PIECE_ROWS, Batcher, Pace

Columns = Mapping[str, NDArray[Any]]


class Compute:
    """Doubles x; refuses a batch with a negative number; keeps the rows of each call."""

    def __init__(self) -> None:
        self.calls: list[list[float]] = []

    def __call__(self, columns: Columns) -> NDArray[Any]:
        self.calls.append(columns["x"].tolist())
        if (columns["x"] < 0).any():
            raise ValueError("negative")
        return 2 * columns["x"]


class Later(Executor):
    """A pool whose work is done when the test says so."""

    def __init__(self) -> None:
        self.work: list[Any] = []

    def submit(self, act: Any, /, *arguments: Any, **options: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        self.work.append(lambda: future.set_result(act(*arguments, **options)))
        return future


def rows(*values: float) -> tuple[Columns, int]:
    return {"x": np.array(values)}, len(values)


async def gather(batcher: Batcher, requests: list[list[float]]) -> list[Any]:
    runs = (batcher.run(*rows(*request)) for request in requests)
    return await asyncio.gather(*runs, return_exceptions=True)


@given(
    requests=st.lists(st.lists(st.integers(-2, 40), min_size=1, max_size=40), max_size=12),
    batch_seconds=st.sampled_from([1e-9, 1e-3, 1.0]),
)
def test_each_gets_its_own_rows_and_only_its_own_failure(
    requests: list[list[float]], batch_seconds: float
) -> None:
    with ThreadPoolExecutor(1) as pool:
        batcher = Batcher(Compute(), pool, batch_seconds)
        answers = asyncio.run(gather(batcher, requests))
    for request, answer in zip(requests, answers, strict=True):
        if min(request) < 0:
            assert isinstance(answer, ValueError)
        else:
            assert answer.tolist() == [2 * value for value in request]


def test_what_arrives_while_a_batch_is_computed_is_the_next_batch() -> None:
    async def run() -> list[Any]:
        first = asyncio.create_task(gather(batcher, [[1]]))
        while not pool.work:
            await asyncio.sleep(0)
        others = asyncio.create_task(gather(batcher, [[2], [3, 4], [5]]))
        await asyncio.sleep(0)
        pool.work.pop()()
        while not pool.work and not others.done():
            await asyncio.sleep(0)
        for work in pool.work:
            work()
        return [*await first, *await others]

    compute, pool = Compute(), Later()
    batcher = Batcher(compute, pool, batch_seconds=1e6)
    answers = asyncio.run(run())
    assert [answer.tolist() for answer in answers] == [[2], [4], [6, 8], [10]]
    assert compute.calls == [[1], [2, 3, 4, 5]]


def test_who_has_left_is_not_computed() -> None:
    async def run() -> None:
        leaving = asyncio.create_task(batcher.run(*rows(1)))
        staying = asyncio.create_task(batcher.run(*rows(2)))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        while not pool.work:
            await asyncio.sleep(0)
        pool.work.pop()()
        await staying

    compute, pool = Compute(), Later()
    batcher = Batcher(compute, pool, batch_seconds=1e6)
    asyncio.run(run())
    assert compute.calls == [[2]]


def test_rows_that_cannot_lie_in_one_array_are_computed_one_by_one() -> None:
    async def run() -> list[Any]:
        wide = {"x": np.ones((1, 3))}
        runs = [batcher.run(*rows(0)), batcher.run(*rows(1)), batcher.run(wide, 1)]
        async with asyncio.timeout(10):
            return [*await asyncio.gather(*runs), await batcher.run(*rows(2))]

    with ThreadPoolExecutor(1) as pool:
        batcher = Batcher(Compute(), pool, batch_seconds=1e6)
        answers = asyncio.run(run())
    assert [answer.tolist() for answer in answers] == [[0], [2], [[2, 2, 2]], [4]]


def test_many_rows_are_computed_in_pieces_until_who_asked_has_left() -> None:
    async def run() -> None:
        leaving = asyncio.create_task(batcher.run(*rows(*range(10 * PIECE_ROWS))))
        while not pool.work:
            await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        pool.work.pop()()
        await asyncio.sleep(0)

    compute, pool = Compute(), Later()
    batcher = Batcher(compute, pool, batch_seconds=1)
    asyncio.run(run())
    assert [len(call) for call in compute.calls] == [PIECE_ROWS]
    assert pool.work == []


def test_the_pace_is_that_of_batches_of_a_like_size() -> None:
    pace = Pace(first_seconds=0.02)
    assert pace.expect(3) == 0.06
    pace.record(1, 1e-4)
    assert pace.expect(1) == 1e-4
    assert pace.expect(16) == pytest.approx(16e-4)  # as if nothing were gained by a batch
    pace.record(16, 2e-4)
    assert pace.expect(17) == 2e-4
    assert pace.expect(1) == 1e-4
    assert pace.expect(64) == pytest.approx(8e-4)


def test_small_batches_do_not_keep_large_ones_in_a_thread() -> None:
    """One row alone has all the costs of a call, so that many rows are not many times as long."""

    async def run() -> list[int]:
        for count in (1, 16, 16):
            running = asyncio.create_task(gather(batcher, [[1]] * count))
            while not running.done():
                await asyncio.sleep(0)
                if pool.work:
                    pool.work.pop()()
                    in_pool.append(count)
        return in_pool

    in_pool: list[int] = []
    pool = Later()
    pace = Pace(first_seconds=0.02)
    pace.record(1, 0.9e-3)
    batcher = Batcher(Compute(), pool, pace=pace)
    assert asyncio.run(run()) == [16]
