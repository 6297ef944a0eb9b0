"""What became of the requests for a model with a candidate, summed over all replicas."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

from heliostat.serve.delivery import Tally
from heliostat.serve.fork import Side

NAMESPACE = "heliostat"
FLUSH_SECONDS = 1.0


@dataclass(frozen=True)
class Scores:
    served: Tally
    candidate: Tally


class Scoreboard:
    """An actor that lives as long as somebody follows the candidate of `name`."""

    def __init__(self) -> None:
        self._sums: dict[Side, Tally] = {"served": Tally(), "candidate": Tally()}

    def add(self, sums: Mapping[Side, Tally]) -> None:
        for side, tally in sums.items():
            self._sums[side] += tally

    def read(self) -> Scores:
        return Scores(**self._sums)


def find_board(name: str, proposal: str) -> str:
    """The actor's name; those of an earlier candidate are not counted for a later one."""
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
