"""A candidate that is watched: what ends it, by what replicas told and by what the table says."""

import pytest

from heliostat.errors import HeliostatError
from heliostat.serve.delivery import tally
from heliostat.serve.follow import follow
from heliostat.serve.scores import Scoreboard
from heliostat.serve.table import Candidate, Placement, withdraw
from heliostat.spec import CandidateSpec

TERMS = CandidateSpec(min_requests=3)
CANDIDATE = Candidate(number=2, proposal="first", terms=TERMS)
OTHER = Candidate(number=3, proposal="second", terms=TERMS)
PLACED = Placement(number=1, candidate=CANDIDATE)


def test_it_takes_over_once_the_replicas_have_told_enough_in_its_favour() -> None:
    board, pauses = Scoreboard(), 0

    def answer(seconds: float) -> None:
        nonlocal pauses
        pauses += 1
        board.add({"served": tally(False, 0.01), "candidate": tally(False, 0.01)})

    said = follow("digits", CANDIDATE, board, lambda: PLACED, answer)
    assert said.startswith("digits:2 is as good: 3 requests, 0 failed")
    assert pauses == 3


def test_it_ends_when_another_deploy_has_taken_its_place_and_leaves_that_alone() -> None:
    table = iter([PLACED, Placement(number=1, candidate=OTHER)])
    with pytest.raises(HeliostatError, match="another deploy has ended it"):
        follow("digits", CANDIDATE, Scoreboard(), lambda: next(table), lambda seconds: None)
    assert withdraw(PLACED, CANDIDATE) == Placement(number=1)
    now = Placement(number=1, candidate=OTHER)
    assert withdraw(now, CANDIDATE) == now


def test_an_interrupt_comes_through() -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow("digits", CANDIDATE, Scoreboard(), lambda: PLACED, interrupt)
