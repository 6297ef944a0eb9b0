"""What became of the requests for a model with a candidate, summed over all replicas."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

from heliostat.serve.delivery import Tally
from heliostat.serve.fork import Side
from heliostat.serve.office import NAMESPACE

FLUSH_SECONDS = 1.0


@dataclass(frozen=True)
class Scores:
    served: Tally
    candidate: Tally


class Scoreboard:
    """The sums of one candidate, and of the version served beside it."""

    def __init__(self) -> None:
        self._sums: dict[Side, Tally] = {"served": Tally(), "candidate": Tally()}

    def add(self, sums: Mapping[Side, Tally]) -> None:
        for side, tally in sums.items():
            self._sums[side] += tally

    def read(self) -> Scores:
        return Scores(**self._sums)


def find_board(name: str, proposal: str) -> str:
    """The name of the actor that has the board; that of an earlier candidate is another one."""
    return f"candidate-{name}-{proposal}"


class Reporter:
    """Sends what a replica counts to the boards, where there are any, once in FLUSH_SECONDS."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[Side, Tally]] = {}
        self._sending: asyncio.Task[None] | None = None

    def count(self, board: str, side: Side, tally: Tally) -> None:
        sums = self._sums.setdefault(board, {})
        sums[side] = sums.get(side, Tally()) + tally
        if self._sending is None:
            self._sending = asyncio.create_task(self._send())

    async def _send(self) -> None:
        await asyncio.sleep(FLUSH_SECONDS)
        sums, self._sums, self._sending = self._sums, {}, None
        for board, tallies in sums.items():
            actor = await asyncio.to_thread(_look_up, board)
            if actor is not None:
                actor.add.remote(tallies)


def _look_up(board: str) -> Any:
    try:
        return ray.get_actor(board, NAMESPACE)
    except ValueError:  # nobody follows
        return None
