"""Rows of requests that arrive together, computed together."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Columns = Mapping[str, NDArray[Any]]
Rows = NDArray[Any]
Compute = Callable[[Columns], Rows]

INLINE_SECONDS = 0.001  # to another thread and back costs a request more than waiting for so long
BATCH_SECONDS = 0.02
MAX_ROWS = 1024
PIECE_ROWS = 16
RECENT = 0.2  # the weight of the newest measurement, once there are some


class Waiting(NamedTuple):
    columns: Columns
    rows: int
    answer: "asyncio.Future[Rows]"
    may_hold: bool


class Pace:
    """How long batches take, by the power of two that their rows reach.

    A batch larger than any before is taken to need the more, the more rows it has; before the first
    one is measured, `first_seconds` a row.
    """

    def __init__(self, first_seconds: float) -> None:
        self._first_seconds = first_seconds
        self._seconds = dict[int, float]()
        self._times = Counter[int]()

    def record(self, rows: int, seconds: float) -> None:
        size = rows.bit_length()
        self._times[size] += 1
        known = self._seconds.get(size, 0.0)
        weight = max(RECENT, 1 / self._times[size])
        self._seconds[size] = known + weight * (seconds - known)

    def expect(self, rows: int) -> float:
        """Seconds that so many rows will take."""
        size = rows.bit_length()
        if size in self._seconds:
            return self._seconds[size]
        smaller = max((known for known in self._seconds if known < size), default=None)
        if smaller is None:
            return min(self._seconds.values(), default=rows * self._first_seconds)
        return self._seconds[smaller] * 2.0 ** (size - smaller)


class Batcher:
    """Computes what is waiting as one batch, while the requests of the next one arrive.

    Nothing waits for company: a batch is what came in while the one before was computed, or in one
    turn of the event loop. It has so many rows that it takes `batch_seconds` at the pace measured,
    in the processor's time: what else runs on the machine makes no batch smaller. `pace` is what is
    known of it already.
    """

    def __init__(
        self,
        compute: Compute,
        pool: Executor,
        batch_seconds: float = BATCH_SECONDS,
        pace: Pace | None = None,
    ) -> None:
        self._compute, self._pool = compute, pool
        self._batch_seconds = batch_seconds
        self._waiting: deque[Waiting] = deque()
        self._pace = pace or Pace(batch_seconds)
        self._running = False

    async def run(self, columns: Columns, rows: int, may_hold: bool = True) -> Rows:
        """What `compute` says of these rows; what it raises for them is raised here.

        Many rows are computed in pieces, as many at once as others' are: they take no more memory,
        and those of who has left are not computed. Rows that may not hold the event loop go to the
        pool, however fast others of their number were.
        """
        if rows <= PIECE_ROWS:
            return await self._submit(columns, rows, may_hold)
        pieces = [self._submit(*piece, may_hold) for piece in cut(columns, rows)]
        return np.concatenate(await asyncio.gather(*pieces))

    def _submit(self, columns: Columns, rows: int, may_hold: bool) -> "asyncio.Future[Rows]":
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Rows] = loop.create_future()
        self._waiting.append(Waiting(columns, rows, answer, may_hold))
        if not self._running:
            self._running = True
            loop.call_soon(self._start, loop)
        return answer

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        batch = self._take()
        if not batch:
            self._running = False
        elif self._may_hold(batch):
            self._answer(batch, self._measure(batch))
            self._running = bool(self._waiting)
            if self._running:
                loop.call_soon(self._start, loop)
        else:
            computed = loop.run_in_executor(self._pool, self._measure, batch)
            computed.add_done_callback(lambda done: self._continue(loop, batch, done))

    def _continue(
        self,
        loop: asyncio.AbstractEventLoop,
        batch: list[Waiting],
        done: "asyncio.Future[list[Rows | Exception]]",
    ) -> None:
        self._answer(batch, done.result())
        self._start(loop)

    def _take(self) -> list[Waiting]:
        """The oldest that wait, as many as fit a batch and one at least, without who has left."""
        batch: list[Waiting] = []
        rows = 0
        while self._waiting and (not batch or self._has_time(rows + self._waiting[0].rows)):
            one = self._waiting.popleft()
            if not one.answer.done():
                batch.append(one)
                rows += one.rows
        return batch

    def _may_hold(self, batch: list[Waiting]) -> bool:
        is_fast = self._pace.expect(count_rows(batch)) <= INLINE_SECONDS
        return is_fast and all(one.may_hold for one in batch)

    def _has_time(self, rows: int) -> bool:
        return rows <= MAX_ROWS and self._pace.expect(rows) <= self._batch_seconds

    def _measure(self, batch: list[Waiting]) -> list[Rows | Exception]:
        began = time.thread_time()
        outcomes = list(compute_together(self._compute, batch))
        self._pace.record(count_rows(batch), time.thread_time() - began)
        return outcomes

    def _answer(self, batch: list[Waiting], outcomes: list[Rows | Exception]) -> None:
        for one, outcome in zip(batch, outcomes, strict=True):
            if one.answer.done():
                continue
            if isinstance(outcome, Exception):
                one.answer.set_exception(outcome)
            else:
                one.answer.set_result(outcome)


def cut(columns: Columns, rows: int) -> Iterator[tuple[Columns, int]]:
    """The rows in pieces of at most PIECE_ROWS, and how many each has."""
    for start in range(0, rows, PIECE_ROWS):
        stop = min(start + PIECE_ROWS, rows)
        yield {name: values[start:stop] for name, values in columns.items()}, stop - start


def count_rows(batch: list[Waiting]) -> int:
    return sum(one.rows for one in batch)


def compute_together(compute: Compute, batch: list[Waiting]) -> Iterator[Rows | Exception]:
    """The rows of each; if the batch fails, each alone, so that one cannot fail its neighbours."""
    together = _try(compute, batch)
    if len(batch) == 1:
        yield together
    elif isinstance(together, Exception):
        yield from (_try(compute, [one]) for one in batch)
    else:
        ends = accumulate(one.rows for one in batch)
        yield from (together[end - one.rows : end] for one, end in zip(batch, ends, strict=True))


def _try(compute: Compute, batch: list[Waiting]) -> Rows | Exception:
    try:
        return compute(_join([one.columns for one in batch]))
    except Exception as error:  # raised again by `run`
        return error


def _join(several: list[Columns]) -> Columns:
    """The rows of all, one after another; those of one as they are."""
    first, *others = several
    if not others:
        return first
    return {name: np.concatenate([columns[name] for columns in several]) for name in first}
