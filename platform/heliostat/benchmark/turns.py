"""Two trainings that take turns of seconds on one machine, so that both have the same noise."""

import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import psutil

TURN_SECONDS = 4.0
SETTLE_SECONDS = 0.5  # of a turn, after which caches are warm again
WARM_TURNS = 4  # of each, which do not count

Pids = Sequence[int]


@dataclass(frozen=True)
class Turn:
    """Who ran, an index, and when (Unix time)."""

    side: int
    start: float
    stop: float


def take_turns(sides: tuple[Pids, Pids], run: Callable[[], bool]) -> list[Turn]:
    """Stop the processes of one side while the other has its turn, for as long as both `run`."""
    turns: list[Turn] = []
    try:
        while run():
            side = len(turns) % 2
            _signal(sides[1 - side], signal.SIGSTOP)
            _signal(sides[side], signal.SIGCONT)
            began = time.time()
            time.sleep(TURN_SECONDS)
            turns.append(Turn(side, began + SETTLE_SECONDS, time.time()))
    finally:
        for pids in sides:
            _signal(pids, signal.SIGCONT)
    return turns


def find_paces(turns: Sequence[Turn], side: int, ends: Sequence[float], every: int) -> list[float]:
    """Seconds a step in each turn of `side` that counts; `ends` is when each `every`-th step ended.

    A turn in which no two of them ended does not count.
    """
    mine = [turn for turn in turns if turn.side == side][WARM_TURNS:]
    return [pace for turn in mine for pace in _find_pace(turn, ends, every)]


def compare(ones: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The mean ratio of a turn of `ones`, who began, to the mean of the two of `others` around it,
    and the standard error of that. Noise that lasts longer than a turn is in both.
    """
    around = [(before + after) / 2 for before, after in pairwise(others)]
    ratios = [one / other for one, other in zip(ones[1:], around, strict=False)]
    return statistics.mean(ratios), statistics.stdev(ratios) / math.sqrt(len(ratios))


def _find_pace(turn: Turn, ends: Sequence[float], every: int) -> Iterator[float]:
    inside = [end for end in ends if turn.start <= end <= turn.stop]
    if len(inside) > 1:
        yield statistics.mean(after - before for before, after in pairwise(inside)) / every


def _signal(pids: Pids, number: signal.Signals) -> None:
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).send_signal(number)
