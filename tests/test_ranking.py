"""Ranking: the same as counting it user by user, and blind to what a user already has."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from torch import Tensor, nn

from heliostat.data.encoding import encode
from heliostat.data.features import Column, IdColumn, NumericColumn, TableFeatures, input_of
from heliostat.evaluate import Predictor
from heliostat.evaluate.ranking import (
    Beside,
    can_rank,
    explain_none,
    measure_ranks,
    rank_items,
    render,
)
from heliostat.models.tasks import choose_task
from heliostat.signature import Classes, Numbers, Output, Signature

RATING = Numbers(("stars",), (3.5,), (1.0,))
USER = IdColumn("user", ("a", "b", "c"))
ITEM = IdColumn("item", tuple(str(number) for number in range(12)))


def count_slowly(
    scores: list[float], excluded: list[bool], relevant: list[bool], top: int
) -> tuple[float, float, float] | None:
    """Hit rate, recall and NDCG of one user, as they are written in books."""
    items = [item for item in range(len(scores)) if not excluded[item]]
    liked = [item for item in items if relevant[item]]
    if not liked:
        return None
    ranking = sorted(items, key=lambda item: -scores[item])[:top]
    found = [rank for rank, item in enumerate(ranking, start=1) if item in liked]
    gain = sum(1 / math.log2(1 + rank) for rank in found)
    best = sum(1 / math.log2(1 + rank) for rank in range(1, min(top, len(liked)) + 1))
    return float(bool(found)), len(found) / len(liked), gain / best


@given(st.integers(0, 5), st.integers(1, 8), st.integers(1, 10), st.data())
def test_ranks_are_those_counted_one_by_one(
    users: int, items: int, top: int, data: st.DataObject
) -> None:
    shape = (users, items)
    scores = data.draw(nps.arrays(np.float32, shape, elements=st.integers(-3, 3)))
    excluded, relevant = (data.draw(nps.arrays(np.bool_, shape)) for _ in range(2))
    measured = measure_ranks(scores, excluded, relevant, top)
    slow = [
        count_slowly(*rows, top=top)
        for rows in zip(scores.tolist(), excluded.tolist(), relevant.tolist(), strict=True)
    ]
    counted = [one for one in slow if one]
    assert measured["users"] == len(counted)
    sums = np.sum(counted, axis=0) if counted else np.zeros(3)
    names = [f"{name}@{top}" for name in ("hit_rate", "recall", "ndcg")]
    assert [measured[name] for name in names] == pytest.approx(sums)


def test_a_perfect_order_scores_1_and_a_reversed_one_0() -> None:
    relevant = np.zeros((2, 40), np.bool_)
    relevant[:, :15] = True
    best, worst = (
        measure_ranks(sign * np.arange(40.0)[None].repeat(2, axis=0), ~relevant & False, relevant)
        for sign in (-1, 1)
    )
    assert best["ndcg@10"] == best["hit_rate@10"] == 2
    assert best["recall@10"] == pytest.approx(2 * 10 / 15)
    assert (worst["ndcg@10"], worst["hit_rate@10"], worst["recall@10"]) == (0, 0, 0)


class ByItem(nn.Module):
    """Every user likes the items with high numbers."""

    def forward(self, ids: Tensor, others: Tensor) -> Tensor:
        assert others.shape == (len(ids), 0)
        return ids[:, 1:].float()


class AgainstItem(nn.Module):
    """Two logits; every user likes the items with low numbers."""

    def forward(self, ids: Tensor, others: Tensor) -> Tensor:
        return torch.stack([torch.zeros(len(ids)), -ids[:, 1].float()], dim=1)


def make_predictor(
    features: TableFeatures, output: Output = RATING, network: nn.Module | None = None
) -> Predictor:
    task = choose_task(Signature(input_of(features), output))
    return Predictor(network or ByItem(), task, features, output)


def make_rows(*rows: tuple[str, str, float]) -> dict[str, npt.NDArray[np.generic]]:
    users, items, stars = zip(*rows, strict=True)
    return {
        "x.user": np.array(users, object),
        "x.item": np.array(items, object),
        "label": np.array(stars),
    }


def test_new_items_are_ranked_among_all_that_the_user_does_not_have() -> None:
    predictor = make_predictor(TableFeatures((USER, ITEM)))
    known = make_rows(("a", "11", 5.0), ("b", "0", 1.0))
    test = make_rows(
        ("a", "10", 4.0),  # now the first for a
        ("a", "3", 3.5),  # not above the mean
        ("b", "1", 5.0),  # behind ten others
        ("c", "0", 1.0),  # c likes nothing
        ("a", "new", 5.0),
        ("new", "11", 5.0),
    )
    ranked = rank_items(predictor, [known], [test])
    assert ranked == {"ranked_users": 2, "hit_rate@10": 0.5, "recall@10": 0.5, "ndcg@10": 0.5}
    assert "ndcg@10 0.5" in render(ranked)
    assert rank_items(predictor, [known], [make_rows(("c", "0", 1.0))]) == {"ranked_users": 0}


def test_classes_are_ranked_by_the_second() -> None:
    features, classes = TableFeatures((USER, ITEM)), Classes(("no", "yes"))
    predictor = make_predictor(features, classes, AgainstItem())
    test = make_rows(("a", "0", 1), ("a", "11", 0), ("b", "11", 1))
    ranked = rank_items(predictor, [], [test])
    assert (ranked["ranked_users"], ranked["hit_rate@10"]) == (2, 0.5)


class ByInputs(nn.Module):
    """Of the three inputs the first puts item 10 on top, the third would turn everything round."""

    def forward(self, ids_N2: Tensor, inputs_N3: Tensor) -> Tensor:
        scores_N3 = torch.tensor([100.0, 0.0, -1e6]) * inputs_N3 * ids_N2[:, 1:]
        return scores_N3.sum(dim=1, keepdim=True)


def test_what_an_item_has_in_all_rows_goes_with_it_and_what_varies_is_held_at_the_mean() -> None:
    columns = [NumericColumn(name, 0.0, 1.0, False) for name in ("length", "age", "time")]
    predictor = make_predictor(TableFeatures((USER, ITEM, *columns)), network=ByInputs())
    known = make_rows(("a", "10", 1.0), ("b", "10", 1.0), ("a", "9", 1.0), ("b", "9", 1.0))
    # length goes with the item, age with the user, the mean of time is 0.
    known["numbers"] = np.array([[3.0, 1, 5], [3, 2, -5], [-1, 1, -5], [-1, 2, 5]])
    test = make_rows(("c", "10", 5.0), ("b", "1", 5.0))
    test["numbers"] = np.array([[3.0, 4, 7], [0, 2, 7]])
    beside = Beside(3, 12, 3)
    beside.add(*encode(predictor.features, known))
    of_users, of_items = beside.split()
    assert of_items[ITEM.values.index("10") + 1].tolist() == [3, 0, 0]
    assert of_items[ITEM.values.index("9") + 1].tolist() == [-1, 0, 0]
    assert of_users[1:].tolist() == [[0, 1, 0], [0, 2, 0], [0, 1.5, 0]]
    ranked = rank_items(predictor, [known], [test])
    assert (ranked["ranked_users"], ranked["hit_rate@10"]) == (2, 1.0)


@pytest.mark.parametrize(
    ("columns", "output", "reason"),
    [
        ((USER,), RATING, "1 columns are ids"),
        ((USER, NumericColumn("age", 0.0, 1.0, False)), RATING, "1 columns are ids"),
        ((USER, ITEM), Numbers(("a", "b"), (0.0, 0.0), (1.0, 1.0)), "2 numbers are predicted"),
        ((USER, ITEM), Classes(("a", "b", "c")), "3 classes have no order"),
        ((NumericColumn("age", 0.0, 1.0, False),), RATING, None),
    ],
)
def test_what_has_no_order_of_items_is_not_ranked_and_says_why(
    columns: tuple[Column, ...], output: Output, reason: str | None
) -> None:
    predictor = make_predictor(TableFeatures(columns), output)
    assert not can_rank(predictor)
    assert (reason or "") in (explain_none(predictor) or "")
    assert (explain_none(predictor) is None) == (reason is None)
    assert rank_items(predictor, [], []) == {}
    assert render({}) == ""
