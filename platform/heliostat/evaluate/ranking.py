"""Ranking: how high a model of users and items puts what a user liked, among all that is new to it.

The protocol is leave-out: a user's relevant items are those of its test rows whose number lies
above the mean of training, or whose class is the second of two. Every item that training knows is
ranked, without those that the user has in training or validation. No sample of items stands for
all: that orders models differently (Krichene, Rendle 2020, On Sampled Metrics for Item
Recommendation). Users and items that training has not seen are left out.
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

Columns = Mapping[str, npt.NDArray[Any]]
Matrix = npt.NDArray[np.bool_]


def can_rank(predictor: Predictor) -> bool:
    """Whether a row is a user, an item and nothing else, and what is predicted has one order."""
    features = predictor.features
    if not isinstance(features, TableFeatures) or len(features.columns) != 2:
        return False
    match predictor.output:
        case Numbers(names):
            return len(features.ids) == 2 and len(names) == 1
        case Classes(labels):
            return len(features.ids) == 2 and len(labels) == 2
        case _:
            return False


def rank_items(
    predictor: Predictor, known: Iterable[Columns], test: Iterable[Columns]
) -> dict[str, float]:
    """Means of `measure_ranks` over users, the first id column; nothing if it cannot rank.

    `known` are the rows of training and validation, `test` those that are held out.
    """
    if not can_rank(predictor):
        return {}
    relevant = _collect(predictor, test, only_relevant=True)
    excluded = _collect(predictor, known, only_relevant=False)
    items = len(_id_columns(predictor)[1].values)
    sums: dict[str, float] = {}
    users_per_block = max(1, PAIRS_AT_ONCE // items)
    users = sorted(user for user in relevant if user)
    for first in range(0, len(users), users_per_block):
        block = users[first : first + users_per_block]
        measured = measure_ranks(
            _score_pairs(predictor, block, items),
            _to_matrix(excluded, block, items),
            _to_matrix(relevant, block, items),
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


def _id_columns(predictor: Predictor) -> Any:
    assert isinstance(predictor.features, TableFeatures)
    return predictor.features.ids


def _collect(
    predictor: Predictor, batches: Iterable[Columns], *, only_relevant: bool
) -> dict[int, set[int]]:
    """The items of each user, by their numbers."""
    found: dict[int, set[int]] = {}
    for columns in batches:
        ids_N2 = encode(predictor.features, dict(columns))[0]
        kept_N = ids_N2.all(axis=1)
        if only_relevant:
            # Numbers are standardised: the mean of training is 0.
            kept_N &= encode_targets(predictor.output, dict(columns)).reshape(len(ids_N2)) > 0
        for user, item in ids_N2[kept_N].tolist():
            found.setdefault(user, set()).add(item)
    return found


def _to_matrix(found: dict[int, set[int]], users: list[int], items: int) -> Matrix:
    """Item number i, from 1 on, is column i - 1."""
    matrix_UI = np.zeros((len(users), items), np.bool_)
    for row, user in enumerate(users):
        matrix_UI[row, [item - 1 for item in found.get(user, ())]] = True
    return matrix_UI


@torch.inference_mode()
def _score_pairs(predictor: Predictor, users: list[int], items: int) -> npt.NDArray[np.float32]:
    """(users, items): what the network says of each pair."""
    pairs = torch.cartesian_prod(torch.tensor(users), torch.arange(1, items + 1)).reshape(-1, 2)
    outputs = predictor.network(pairs, torch.empty(len(pairs), 0)).float()
    values = probabilities(outputs) if isinstance(predictor.output, Classes) else outputs
    scores: npt.NDArray[np.float32] = values[:, -1].reshape(len(users), items).numpy()
    return scores
