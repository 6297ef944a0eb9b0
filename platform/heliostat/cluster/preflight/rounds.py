"""Who meets whom: every pair of some nodes once, in rounds in which each node has one partner."""

from collections.abc import Sequence
from itertools import accumulate

Pair = tuple[str, str]


def draw_rounds(names: Sequence[str]) -> list[list[Pair]]:
    """All pairs, in the fewest rounds: n - 1 of n / 2 pairs, where n is even, else n with one idle.

    The first name stays and the others move on by a seat: the circle method of tournaments.
    """
    seats: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    rounds = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        facing = zip(seats[:half], reversed(seats[half:]), strict=True)
        rounds.append([(a, b) for a, b in facing if a is not None and b is not None])
        seats.insert(1, seats.pop())
    return rounds


def cap_rounds(rounds: Sequence[list[Pair]], most_pairs: int) -> list[list[Pair]]:
    """The first rounds, whole, as long as they have no more pairs in all.

    But so many that each node has two partners: one who has met but a slow node looks like it.
    """
    totals = accumulate(len(pairs) for pairs in rounds)
    kept = sum(total <= most_pairs for total in totals)
    is_odd = len({name for pairs in rounds for pair in pairs for name in pair}) % 2
    return list(rounds[: max(kept, 2 + is_odd)])
