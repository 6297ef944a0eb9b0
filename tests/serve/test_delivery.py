"""A candidate takes over when it has shown to be as good, and never when it is surely worse."""

from functools import reduce
from operator import add

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.serve.delivery import (
    Promote,
    TakeBack,
    Tally,
    Wait,
    compare,
    judge,
    surely_above,
    tally,
)
from heliostat.spec import CandidateSpec

TERMS = CandidateSpec(min_requests=100, timeout_s=60)
SECONDS = st.floats(1e-4, 60)


def many(requests: int, failures: int = 0, seconds: float = 0.01) -> Tally:
    outcomes = [tally(i < failures, seconds) for i in range(requests)]
    return reduce(add, outcomes, Tally())


@given(st.lists(SECONDS, min_size=1, max_size=40), st.floats(0.01, 1))
def test_a_quantile_is_right_to_ten_percent(seconds: list[float], share: float) -> None:
    total = reduce(add, (tally(False, one) for one in seconds))
    exact = float(np.quantile(seconds, share, method="inverted_cdf"))
    assert exact <= total.quantile(share) * (1 + 1e-9)
    assert total.quantile(share) <= exact * 1.1 * (1 + 1e-9)


@given(st.lists(st.tuples(st.booleans(), SECONDS), max_size=12), st.integers(0, 12))
def test_sums_over_replicas_are_sums_over_requests(
    requests: list[tuple[bool, float]], cut: int
) -> None:
    def total(of: list[tuple[bool, float]]) -> Tally:
        return reduce(add, (tally(*one) for one in of), Tally())

    assert total(requests[:cut]) + total(requests[cut:]) == total(requests)


@given(requests=st.integers(0, 300), seconds=st.floats(0, 59))
def test_one_that_never_fails_is_promoted_at_the_requests_wanted_and_not_before(
    requests: int, seconds: float
) -> None:
    verdict = judge(TERMS, many(1000), many(requests), seconds)
    assert verdict == (Promote() if requests >= TERMS.min_requests else Wait())


@pytest.mark.parametrize(("requests", "failures"), [(1, 1), (20, 3), (99, 99), (100, 6)])
def test_one_that_fails_is_taken_back_at_once(requests: int, failures: int) -> None:
    verdict = judge(TERMS, many(1000), many(requests, failures), 1)
    assert isinstance(verdict, TakeBack)
    assert f"{failures} of {requests} requests failed" in verdict.reason


def test_failures_that_the_served_version_has_as_well_are_not_the_candidates() -> None:
    assert judge(TERMS, many(1000, 100), many(100, 10), 1) == Promote()
    assert isinstance(judge(TERMS, many(1000, 10), many(100, 10), 1), TakeBack)


def test_a_slow_one_is_taken_back_once_enough_is_known() -> None:
    fast, slow = many(1000, seconds=0.01), many(50, seconds=0.03)
    verdict = judge(TERMS, fast, slow, 1)
    assert isinstance(verdict, TakeBack)
    assert "ms" in verdict.reason
    assert judge(TERMS, fast, many(49, seconds=0.03), 1) == Wait()
    assert judge(TERMS, fast, many(100, seconds=0.015), 1) == Promote()


def test_answers_that_differ_by_more_than_was_allowed_are_taken_back() -> None:
    terms = CandidateSpec(mode="shadow", max_difference=0.1)
    near = compare(tally(False, 0.01), 0.1, terms)
    far = compare(tally(False, 0.01), 0.2, terms)
    assert judge(terms, many(10), near, 1) == Wait()
    verdict = judge(terms, many(10), near + far, 1)
    assert verdict == TakeBack("1 of 2 answers differ, by up to 0.2")


def test_one_that_nobody_asks_is_taken_back_in_the_end() -> None:
    assert judge(TERMS, Tally(), Tally(), 60) == Wait()
    verdict = judge(TERMS, Tally(), Tally(), 60.1)
    assert verdict == TakeBack("0 of 100 requests came in 60 s")


@given(total=st.integers(1, 1000), data=st.data())
def test_a_sure_share_is_below_the_one_seen_and_grows_with_what_is_seen(
    total: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, total))
    assert 0 <= surely_above(count, total) <= count / total
    assert surely_above(10 * count, 10 * total) >= surely_above(count, total)
