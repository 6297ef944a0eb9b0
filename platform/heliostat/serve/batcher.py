"""Rows of requests that arrive together, computed together."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

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


@dataclass(frozen=True)
class Waiting:
    columns: Columns
    rows: int
    answer: "asyncio.Future[Rows]"


class Batcher:
    """Computes what is waiting as one batch, while the requests of the next one arrive.

    Nothing waits for company: a batch is what came in while the one before was computed, or in one
    turn of the event loop. It has so many rows that it takes `batch_seconds` at the pace measured.
    """

    def __init__(
        self, compute: Compute, pool: Executor, batch_seconds: float = BATCH_SECONDS
    ) -> None:
        self._compute, self._pool = compute, pool
        self._batch_seconds = batch_seconds
        self._waiting: deque[Waiting] = deque()
        self._row_seconds, self._batches = batch_seconds, 0
        self._running = False

    async def run(self, columns: Columns, rows: int) -> Rows:
        """What `compute` says of these rows; what it raises for them is raised here.

        Many rows are computed in pieces, as many at once as others' are: they take no more memory,
        and those of who has left are not computed.
        """
        if rows <= PIECE_ROWS:
            return await self._submit(columns, rows)
        pieces = [self._submit(*piece) for piece in cut(columns, rows)]
        return np.concatenate(await asyncio.gather(*pieces))

    def _submit(self, columns: Columns, rows: int) -> "asyncio.Future[Rows]":
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Rows] = loop.create_future()
        self._waiting.append(Waiting(columns, rows, answer))
        if not self._running:
            self._running = True
            loop.call_soon(self._start, loop)
        return answer

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        batch = self._take()
        if not batch:
            self._running = False
        elif sum(one.rows for one in batch) * self._row_seconds <= INLINE_SECONDS:
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
        limit = min(MAX_ROWS, self._batch_seconds / self._row_seconds)
        batch: list[Waiting] = []
        rows = 0
        while self._waiting and (not batch or rows + self._waiting[0].rows <= limit):
            one = self._waiting.popleft()
            if not one.answer.done():
                batch.append(one)
                rows += one.rows
        return batch

    def _measure(self, batch: list[Waiting]) -> list[Rows | Exception]:
        began = time.perf_counter()
        outcomes = list(compute_together(self._compute, batch))
        row_seconds = (time.perf_counter() - began) / sum(one.rows for one in batch)
        self._batches += 1
        weight = max(RECENT, 1 / self._batches)
        self._row_seconds += weight * (row_seconds - self._row_seconds)
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
