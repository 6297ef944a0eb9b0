"""Answers under idempotency keys: one claimant at a time, the same answer, in bounded memory."""

import hypothesis.strategies as st
from hypothesis import given

from heliostat.serve.receipts import (
    CLAIM_SECONDS,
    ENTRY_BYTES,
    KEPT_SECONDS,
    MAX_ANSWER_BYTES,
    Question,
    Receipt,
    Receipts,
)

ASKED = Question("ana", "order 1", b"x")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_receipt(size: int = 100, fill: bytes = b"a") -> Receipt:
    return Receipt((), fill * size, "digits", 3)


def keep(receipts: Receipts, question: Question, size: int = 100) -> None:
    assert receipts.claim(question, "one") == "yours"
    receipts.settle(question, "one", make_receipt(size))


def test_the_first_answers_and_all_others_get_that() -> None:
    receipts = Receipts(Clock())
    assert receipts.claim(ASKED, "one") == "yours"
    assert receipts.claim(ASKED, "two") == "busy"
    receipts.settle(ASKED, "two", make_receipt(fill=b"b"))  # it is not for two to say
    receipts.settle(ASKED, "one", make_receipt())
    assert receipts.claim(ASKED, "two") == receipts.claim(ASKED, "one") == make_receipt()


def test_another_question_under_the_same_name_is_another_one_until_the_first_is_forgotten() -> None:
    clock = Clock()
    receipts = Receipts(clock)
    other = Question("ana", "order 1", b"y")
    assert receipts.claim(ASKED, "one") == "yours"
    assert receipts.claim(other, "two") == "other"
    receipts.settle(ASKED, "one", make_receipt())
    assert receipts.claim(other, "two") == "other"
    assert receipts.claim(Question("bob", "order 1", b"y"), "two") == "yours"
    clock.now = KEPT_SECONDS
    assert receipts.claim(other, "two") == "yours"


def test_what_was_given_up_or_whose_holder_is_gone_is_the_next_ones() -> None:
    clock = Clock()
    receipts = Receipts(clock)
    receipts.claim(ASKED, "one")
    receipts.settle(ASKED, "one", None)
    assert receipts.claim(ASKED, "two") == "yours"
    clock.now = CLAIM_SECONDS - 1
    assert receipts.claim(ASKED, "two") == "yours"  # renewed
    clock.now = 2 * CLAIM_SECONDS - 2
    assert receipts.claim(ASKED, "three") == "busy"
    clock.now = 2 * CLAIM_SECONDS - 1
    assert receipts.claim(ASKED, "three") == "yours"
    receipts.settle(ASKED, "two", make_receipt())
    assert receipts.claim(ASKED, "four") == "busy"


def test_an_answer_too_large_is_not_kept() -> None:
    receipts = Receipts(Clock())
    keep(receipts, ASKED, MAX_ANSWER_BYTES + 1)
    assert receipts.claim(ASKED, "two") == "yours"


def test_who_fills_the_memory_loses_his_own() -> None:
    receipts = Receipts(Clock(), max_bytes=10 * (ENTRY_BYTES + 100))
    keep(receipts, Question("bob", "his", b"x"))
    for number in range(50):
        keep(receipts, Question("ana", str(number), b"x"))
    assert receipts.claim(Question("bob", "his", b"x"), "two") == make_receipt()
    assert receipts.claim(Question("ana", "49", b"x"), "two") == make_receipt()
    assert receipts.claim(Question("ana", "0", b"x"), "two") == "yours"


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["claim", "keep", "give up", "wait"]),
        st.sampled_from(["ana", "bob"]),
        st.integers(0, 3),
        st.sampled_from(["one", "two"]),
        st.integers(0, 3000),
    ),
    max_size=40,
)


@given(STEPS)
def test_memory_is_bounded_and_counted(steps: list[tuple[str, str, int, str, int]]) -> None:
    clock = Clock()
    receipts = Receipts(clock, max_bytes=8000)
    for what, owner, number, claimant, amount in steps:
        question = Question(owner, str(number), b"x")
        match what:
            case "claim":
                receipts.claim(question, claimant)
            case "keep":
                receipts.settle(question, claimant, make_receipt(amount))
            case "give up":
                receipts.settle(question, claimant, None)
            case "wait":
                clock.now += amount
        entries = [entry for names in receipts._owners.values() for entry in names.values()]
        assert receipts.size == sum(entry.size for entry in entries) <= 8000
        assert receipts._sizes.keys() == receipts._owners.keys()
