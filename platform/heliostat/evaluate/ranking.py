"""Ranking: how high a model of users and items puts what a user liked, among all that is new to it.

The protocol is leave-out: a user's relevant items are those of its test rows whose number lies
above the mean of training, or whose class is the second of two. Every item that training knows is
ranked, without those that the user has in training or validation. No sample of items stands for
all: that orders models differently (Krichene, Rendle 2020, On Sampled Metrics for Item
Recommendation). Users and items that training has not seen are left out.

Inputs beside the two ids go with the item if all of its rows have the same, as its genre, else with
the user if all of theirs have; others, as the time of a rating, are held at their mean.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from heliostat.data.encoding import encode, encode_targets
from heliostat.data.features import TableFeatures
from heliostat.evaluate import Predictor
from heliostat.evaluate.scores import probabilities
from heliostat.signature import Classes, Numbers

TOP = 10
PAIRS_AT_ONCE = 1 << 18
NUMBERS_AT_ONCE = 1 << 24

Columns = Mapping[str, npt.NDArray[Any]]
Floats = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.bool_]


def can_rank(predictor: Predictor) -> bool:
    """Whether a row is of a user and an item, and what is predicted has one order."""
    features = predictor.features
    has_ids = isinstance(features, TableFeatures) and bool(features.ids)
    return has_ids and explain_none(predictor) is None


def explain_none(predictor: Predictor) -> str | None:
    """Why rows with ids cannot be ranked; None if they can, or if they have none."""
    features = predictor.features
    if not isinstance(features, TableFeatures) or not features.ids:
        return None
    if (count := len(features.ids)) != 2:
        return f"no ranking: {count} columns are ids, a ranking is of a user and an item"
    match predictor.output:
        case Numbers(names) if len(names) > 1:
            return f"no ranking: {len(names)} numbers are predicted, items are ranked by one"
        case Classes(labels) if len(labels) > 2:
            return (
                f"no ranking: {len(labels)} classes have no order; set data.task=regression if "
                "they are numbers"
            )
    return None


def rank_items(
    predictor: Predictor, known: Iterable[Columns], test: Iterable[Columns]
) -> dict[str, float]:
    """Means of `measure_ranks` over users, the first id column; nothing if it cannot rank.

    `known` are the rows of training and validation, `test` those that are held out.
    """
    if not can_rank(predictor):
        return {}
    assert isinstance(predictor.features, TableFeatures)
    users, items = (len(column.values) for column in predictor.features.ids)
    width = predictor.features.slots.width
    relevant: Pairs = {}
    excluded: Pairs = {}
    beside = Beside(users, items, width)
    for columns in test:
        ids_N2, _ = encode(predictor.features, dict(columns))
        # Numbers are standardised: the mean of training is 0.
        liked_N = encode_targets(predictor.output, dict(columns)).reshape(len(ids_N2)) > 0
        _add(relevant, ids_N2[liked_N])
    for columns in known:
        ids_N2, inputs_NW = encode(predictor.features, dict(columns))
        _add(excluded, ids_N2)
        beside.add(ids_N2, inputs_NW)
    of_users_UW, of_items_IW = beside.split()
    sums: dict[str, float] = {}
    block = max(1, min(PAIRS_AT_ONCE, NUMBERS_AT_ONCE // max(width, 1)) // items)
    ranked = sorted(relevant)
    for chosen in (ranked[first : first + block] for first in range(0, len(ranked), block)):
        measured = measure_ranks(
            _score_pairs(predictor, chosen, of_users_UW[chosen], of_items_IW[1:]),
            _to_matrix(excluded, chosen, items),
            _to_matrix(relevant, chosen, items),
        )
        for name, total in measured.items():
            sums[name] = sums.get(name, 0.0) + total
    count = sums.pop("users", 0.0)
    means = {name: total / count for name, total in sums.items() if count}
    return {"ranked_users": count, **means}


def measure_ranks(
    scores_UI: npt.NDArray[Any], excluded_UI: Matrix, relevant_UI: Matrix, top: int = TOP
) -> dict[str, float]:
    """Sums over the users who have a relevant item that is not excluded, and their number.

    Of the `top` items by score (of equal ones the first), hit: is one relevant; recall: the share
    of the relevant ones that are among them; ndcg: the sum of 1 / log2(1 + rank) over the relevant
    ones, divided by the largest that it could be (Järvelin, Kekäläinen 2002).
    """
    relevant_UI = relevant_UI & ~excluded_UI
    counted = relevant_UI.any(axis=1)
    relevant_UI = relevant_UI[counted]
    open_UI = np.where(excluded_UI, -np.inf, scores_UI)[counted]
    order_UT = np.argsort(-open_UI, axis=1, kind="stable")[:, :top]
    hits_UT = np.take_along_axis(relevant_UI, order_UT, axis=1)
    gains_T = 1 / np.log2(np.arange(2, order_UT.shape[1] + 2))
    numbers_U = relevant_UI.sum(axis=1)
    best_U = np.cumsum(gains_T)[np.minimum(numbers_U, len(gains_T)) - 1]
    return {
        "users": float(counted.sum()),
        f"hit_rate@{top}": float(hits_UT.any(axis=1).sum()),
        f"recall@{top}": float((hits_UT.sum(axis=1) / numbers_U).sum()),
        f"ndcg@{top}": float((hits_UT @ gains_T / best_U).sum()),
    }


def render(ranked: dict[str, float]) -> str:
    """A line for a terminal, empty if nothing was ranked."""
    return "  ".join(f"{name} {value:.4g}" for name, value in ranked.items())


Pairs = dict[int, set[int]]  # the items of each user; both by their numbers, from 1 on


def _add(pairs: Pairs, ids_N2: npt.NDArray[Any]) -> None:
    for user, item in ids_N2[ids_N2.all(axis=1)].tolist():
        pairs.setdefault(user, set()).add(item)


def _to_matrix(pairs: Pairs, users: list[int], items: int) -> Matrix:
    """Item number i is column i - 1."""
    matrix_UI = np.zeros((len(users), items), np.bool_)
    for row, user in enumerate(users):
        matrix_UI[row, [item - 1 for item in pairs.get(user, ())]] = True
    return matrix_UI


class Beside:
    """What a row has beside its user and its item, told apart by whom it goes with."""

    def __init__(self, users: int, items: int, width: int) -> None:
        self._of_users = _Ranges(users, width)
        self._of_items = _Ranges(items, width)
        self._sum_W = np.zeros(width)
        self._rows = 0

    def add(self, ids_N2: npt.NDArray[Any], inputs_NW: Floats) -> None:
        known_N = ids_N2.all(axis=1)
        self._of_users.add(ids_N2[known_N, 0], inputs_NW[known_N])
        self._of_items.add(ids_N2[known_N, 1], inputs_NW[known_N])
        self._sum_W += inputs_NW[known_N].sum(axis=0, dtype=np.float64)
        self._rows += int(known_N.sum())

    def split(self) -> tuple[Floats, Floats]:
        """(users, width) and (items, width), by number; a pair's inputs are the sum of its two."""
        mean_W = (self._sum_W / max(self._rows, 1)).astype(np.float32)
        with_item_W = self._of_items.agree()
        with_user_W = self._of_users.agree() & ~with_item_W
        items_IW = np.where(with_item_W, self._of_items.values(mean_W), 0)
        users_UW = np.where(with_user_W, self._of_users.values(mean_W), mean_W)
        return np.where(with_item_W, 0, users_UW), items_IW


class _Ranges:
    """The least and the greatest that the rows of each number have of each input."""

    def __init__(self, count: int, width: int) -> None:
        self._least = np.full((count + 1, width), np.inf, np.float32)
        self._greatest = np.full((count + 1, width), -np.inf, np.float32)

    def add(self, numbers_N: npt.NDArray[Any], inputs_NW: Floats) -> None:
        np.minimum.at(self._least, numbers_N, inputs_NW)
        np.maximum.at(self._greatest, numbers_N, inputs_NW)

    def agree(self) -> npt.NDArray[np.bool_]:
        return np.asarray((self._greatest <= self._least).all(axis=0))

    def values(self, otherwise_W: Floats) -> Floats:
        return np.where(np.isfinite(self._least), self._least, otherwise_W)


@torch.inference_mode()
def _score_pairs(
    predictor: Predictor, users: list[int], of_users_UW: Floats, of_items_IW: Floats
) -> Floats:
    """(users, items): what the network says of each pair."""
    items, width = of_items_IW.shape
    pairs = torch.cartesian_prod(torch.tensor(users), torch.arange(1, items + 1)).reshape(-1, 2)
    inputs = torch.from_numpy(of_users_UW[:, None] + of_items_IW[None]).reshape(len(pairs), width)
    outputs = predictor.network(pairs, inputs).float()
    values = probabilities(outputs) if isinstance(predictor.output, Classes) else outputs
    scores: Floats = values[:, -1].reshape(len(users), items).numpy()
    return scores
