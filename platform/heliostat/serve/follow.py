"""Watches a candidate until it is known to be as good as what is served, or worse."""

import time
from collections.abc import Callable
from typing import Any

from heliostat.errors import HeliostatError
from heliostat.serve.delivery import Promote, TakeBack, judge
from heliostat.serve.scores import Scoreboard, Scores
from heliostat.serve.table import Candidate, Placement

LOOK_SECONDS, REPORT_SECONDS = 1.0, 5.0


def follow(
    name: str,
    candidate: Candidate,
    board: Scoreboard,
    find_placed: Callable[[], Placement],
    pause: Callable[[float], None],
) -> str:
    """Wait until the candidate has shown what it is; a sentence in its favour.

    Raises:
        HeliostatError: it is worse, the sentence says in what; or it is no candidate any more.
    """
    began = reported = time.monotonic()
    while True:
        if find_placed().candidate != candidate:
            raise HeliostatError("another deploy has ended it")
        scores = board.read()
        now = time.monotonic()
        verdict = judge(candidate.terms, scores.served, scores.candidate, now - began)
        match verdict:
            case Promote():
                return f"{name}:{candidate.number} is as good: {_render(scores)}"
            case TakeBack(reason):
                raise HeliostatError(reason)
        if now - reported >= REPORT_SECONDS:
            reported = now
            print(f"{now - began:4.0f} s: {_render(scores)}", flush=True)
        pause(LOOK_SECONDS)


def _render(scores: Scores) -> str:
    candidate, served = scores.candidate, scores.served
    told: list[Any] = [
        f"{candidate.requests} requests, {candidate.failures} failed",
        f"95 % within {1000 * candidate.quantile(0.95):.1f} ms",
        f"the one served {1000 * served.quantile(0.95):.1f} ms",
    ]
    if candidate.compared:
        told.append(f"answers differ by up to {candidate.difference:.3g}")
    return ", ".join(told)
