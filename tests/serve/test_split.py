"""Who is asked: a share that is as large as it says and stays whose it is."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.serve.split import Answer, difference, find_model, is_chosen
from heliostat.serve.table import Candidate
from heliostat.spec import CandidateSpec

values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(-9, 9), st.text(max_size=3)),
    lambda children: st.one_of(
        st.lists(children, max_size=3), st.dictionaries(st.text(max_size=2), children, max_size=3)
    ),
    max_leaves=12,
)


def candidate(share: float, number: int = 2) -> Candidate:
    return Candidate(number=number, proposal="p", terms=CandidateSpec(share=share))


def answer(document: object, status: int = 200) -> Answer:
    return Answer(status, (), json.dumps(document).encode())


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_the_share_is_as_large_as_it_says(share: float) -> None:
    tags = [f"tag-{i}" for i in range(20_000)]
    chosen = sum(is_chosen(candidate(share), "digits", tag) for tag in tags)
    assert abs(chosen / len(tags) - share) < 4 * math.sqrt(share * (1 - share) / len(tags))


@given(tag=st.text(), small=st.floats(0.01, 1), large=st.floats(0.01, 1))
def test_a_share_that_grows_keeps_who_was_in_it(tag: str, small: float, large: float) -> None:
    small, large = sorted((small, large))
    if is_chosen(candidate(small), "digits", tag):
        assert is_chosen(candidate(large), "digits", tag)
    assert is_chosen(candidate(1.0), "digits", tag)


def test_the_next_candidate_is_tried_on_others() -> None:
    tags = [f"tag-{i}" for i in range(1000)]
    first, second = (
        {tag for tag in tags if is_chosen(candidate(0.1, number), "digits", tag)}
        for number in (2, 3)
    )
    assert len(first & second) < len(first) / 2


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/v1/models/digits:predict", b"", "digits"),
        ("/v1/models/digits:explain", b"", "digits"),
        ("/v2/models/digits/infer", b"", "digits"),
        ("/v2/models/digits/versions/3/infer", b"", None),
        ("/v1/completions", b'{"model": "sotu"}', "sotu"),
        ("/v1/chat/completions", b'{"model": "sotu"}', "sotu"),
        ("/v1/completions", b'{"model": 3}', None),
        ("/v1/completions", b"[]", None),
        ("/v1/completions", b"{", None),
        ("/v1/models", b'{"model": "sotu"}', None),
        ("/v1/models/a/b:predict", b"", None),
    ],
)
def test_the_model_of_a_request(path: str, body: bytes, name: str | None) -> None:
    assert find_model(path, body) == name


@given(one=values, other=values)
def test_a_difference_is_none_to_itself_and_the_same_from_both_sides(
    one: object, other: object
) -> None:
    assert difference(answer(one), answer(one)) == 0
    assert difference(answer(one), answer(other)) == difference(answer(other), answer(one))


def test_numbers_differ_by_their_distance_and_all_else_entirely() -> None:
    served = {"model": "digits", "version": 1, "predictions": [{"class": "3", "p": [0.5, 0.25]}]}
    near = {"model": "digits", "version": 2, "predictions": [{"class": "3", "p": [0.5, 0.375]}]}
    far = {"model": "digits", "version": 2, "predictions": [{"class": "4", "p": [0.5, 0.25]}]}
    assert difference(answer(served), answer(near)) == 0.125
    assert difference(answer(served), answer(far)) == math.inf
    assert difference(answer(served), answer(served, 422)) == math.inf
    assert difference(answer([1]), answer([1, 2])) == math.inf
    assert difference(answer(True), answer(1)) == math.inf
