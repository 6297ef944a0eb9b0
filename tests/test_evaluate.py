"""Laws of an evaluation: the counts are those of a direct computation, however rows are batched."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from drafting import draft
from heliostat import registry, spec, storage
from heliostat.data.features import (
    CategoryColumn,
    Features,
    ImageFeatures,
    NumericColumn,
    TableFeatures,
    input_of,
)
from heliostat.evaluate import Predictor, load_predictor, predict, score
from heliostat.evaluate.scores import ClassScores, NumberCounter, NumberScores
from heliostat.models import build
from heliostat.models.tasks import choose_task
from heliostat.signature import Classes, Numbers, Signature, Vector

LABELS = ("cat", "dog", "owl")


def let_through(features: Features, labels: tuple[str, ...]) -> Predictor:
    """A network that answers with what it was asked."""
    signature = Signature(input_of(features), Classes(labels))
    return Predictor(nn.Identity(), choose_task(signature), features, signature.output)


@dataclass(frozen=True)
class Predicted:
    """Rows whose logits (N, classes) are known: their columns go through the model unchanged."""

    logits: NDArray[np.float32]
    labels: NDArray[np.int32]

    @property
    def classes(self) -> int:
        return int(self.logits.shape[1])

    @property
    def guesses(self) -> NDArray[Any]:
        return np.asarray(self.logits.argmax(axis=1))

    def score(self, cuts: list[int]) -> ClassScores:
        names = [f"x{i}" for i in range(self.classes)]
        features = TableFeatures(tuple(NumericColumn(name, 0.0, 1.0, False) for name in names))
        batches: list[dict[str, NDArray[Any]]] = [
            {"numbers": logits.astype(np.float64), "label": labels}
            for logits, labels in zip(
                np.split(self.logits, cuts), np.split(self.labels, cuts), strict=True
            )
        ]
        scores = score(let_through(features, tuple(map(str, range(self.classes)))), batches)
        assert isinstance(scores, ClassScores)
        return scores


@st.composite
def predictions(draw: st.DrawFn) -> Predicted:
    rows, classes = draw(st.integers(1, 40)), draw(st.integers(2, 5))
    return Predicted(
        draw(nps.arrays(np.float32, (rows, classes), elements=st.floats(-50, 50, width=32))),
        draw(nps.arrays(np.int32, rows, elements=st.integers(0, classes - 1))),
    )


CUTS = st.lists(st.integers(0, 40), max_size=5).map(sorted)


@given(predictions(), CUTS)
def test_the_counts_are_those_of_a_direct_computation(given: Predicted, cuts: list[int]) -> None:
    scores = given.score(cuts)
    actual, guessed = given.labels, given.guesses
    classes = range(given.classes)
    assert scores.rows == len(actual)
    assert scores.accuracy == pytest.approx(np.mean(actual == guessed))
    assert scores.confusion == tuple(
        tuple(int(np.sum((actual == row) & (guessed == column))) for column in classes)
        for row in classes
    )
    for share, chosen in ((scores.precision, guessed), (scores.recall, actual)):
        for label in classes:
            hits = (actual == guessed)[chosen == label]
            assert share[label] == (pytest.approx(hits.mean()) if len(hits) else None)


@given(predictions(), CUTS)
def test_the_loss_is_one_cross_entropy_over_all_rows(given: Predicted, cuts: list[int]) -> None:
    whole = functional.cross_entropy(
        torch.from_numpy(given.logits), torch.from_numpy(given.labels.astype(np.int64))
    )
    assert given.score(cuts).loss == pytest.approx(whole.item(), rel=1e-5, abs=1e-6)


@given(predictions())
def test_scores_are_json(given: Predicted) -> None:
    scores = given.score([])
    told = json.loads(json.dumps(scores.to_json(), allow_nan=False))
    assert told == scores.to_json()
    assert told["accuracy"] == scores.accuracy
    assert sum(map(sum, told["confusion"])) == told["rows"] == len(given.labels)


def test_a_class_that_is_never_predicted_or_absent_has_no_share() -> None:
    logits = np.eye(3, dtype=np.float32)[[0, 0, 2]]
    scores = Predicted(logits, np.array([0, 1, 1], np.int32)).score([])
    assert scores.confusion == ((1, 0, 0), (1, 0, 1), (0, 0, 0))
    assert scores.precision == (0.5, None, 0.0)
    assert scores.recall == (1.0, 0.0, None)


@pytest.mark.parametrize("cuts", [[], [0, 0]], ids=["one empty batch", "three empty batches"])
def test_no_rows_have_no_score(cuts: list[int]) -> None:
    with pytest.raises(ValueError, match="no rows"):
        Predicted(np.empty((0, 3), np.float32), np.empty(0, np.int32)).score(cuts)
    with pytest.raises(ValueError, match="no rows"):
        score(let_through(TableFeatures(()), LABELS), [])


def count(labels: tuple[str, ...], rows_per_class: int = 7) -> ClassScores:
    """Scores of a model that is always right."""
    confusion = np.eye(len(labels), dtype=np.int64) * rows_per_class
    return ClassScores(labels, 0.25, tuple(tuple(map(int, row)) for row in confusion))


@given(st.lists(st.text(min_size=1), min_size=1, max_size=30), st.integers(0, 10**12))
def test_a_table_has_a_straight_line_per_class(labels: list[str], rows_per_class: int) -> None:
    head, *told = count(tuple(labels), rows_per_class).render().split("\n")
    table = told[: len(labels)]
    assert {len(line) for line in table} == {len(head)}
    assert [int(line.split()[-1]) for line in table] == [rows_per_class] * len(labels)
    matrices = told[len(labels) + 2 : -2]
    assert len(matrices) == (len(labels) if len(labels) <= 20 else 0)
    assert len({len(line) for line in matrices}) <= 1
    assert told[-2] == ""
    assert told[-1].startswith("loss 0.2500  accuracy ")


@pytest.mark.parametrize(
    "labels",
    [
        ("a",),
        tuple("0123456789"),
        ("x" * 5_000, "Γάτα", "猫", "🐈"),
        ("two\nlines", "a\ttab", "\x1b[31mred", "plain"),
        tuple(f"class {number}" for number in range(100)),
    ],
    ids=["one", "digits", "long", "control", "hundred"],
)
def test_a_table_fits_a_terminal_and_holds_no_control_character(labels: tuple[str, ...]) -> None:
    lines = count(labels).render().split("\n")
    assert max(map(len, lines)) <= 120
    assert all(line.isprintable() for line in lines)
    for label, line in zip(labels, lines[1:], strict=False):
        assert line.split()[-3:] == ["1.0000", "1.0000", "7"]
        assert line.startswith(label) or not label.isprintable() or "…" in line


def test_the_names_of_numbers_hold_no_control_character_either() -> None:
    names = ("\x1b[31mred", "two\nlines", "x" * 200, "price")
    some = (1.0,) * len(names)
    lines = NumberScores(names, 3, 0.5, some, some, some).render().splitlines()
    assert all(line.isprintable() and len(line) < 100 for line in lines)
    assert len(lines) == 1 + len(names) + 2


def test_a_table_by_example() -> None:
    scores = ClassScores(LABELS, 1.5, ((1, 0, 0), (1, 0, 1), (0, 0, 0)))
    assert scores.render().split("\n") == [
        "class  precision  recall    rows",
        "cat       0.5000  1.0000       1",
        "dog            -  0.0000       2",
        "owl       0.0000       -       0",
        "",
        "confusion (a row per true class, a column per prediction)",
        "cat        1     0     0",
        "dog        1     0     1",
        "owl        0     0     0",
        "",
        "loss 1.5000  accuracy 0.3333  rows 3",
    ]


IMAGE = ImageFeatures(8, 8, 1, (1 / 3,), (0.1,))
TABLE = TableFeatures(
    (NumericColumn("age", 1 / 3, 0.7, has_missing=True), CategoryColumn("city", ("Köln", "Oslo")))
)
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1)).astype(np.uint8)
ROWS = {
    "numbers": np.array([[1.0], [math.nan], [3.5]]),
    "x.city": np.array(["Oslo", None, "elsewhere"], dtype=object),
}
PUBLISHED: list[tuple[str, Features, dict[str, NDArray[Any]]]] = [
    ("mlp", IMAGE, {"image": PIXELS}),
    ("cnn", IMAGE, {"image": PIXELS}),
    ("mlp", TABLE, ROWS),
]


@pytest.mark.parametrize(("kind", "features", "columns"), PUBLISHED)
def test_a_published_model_answers_bit_for_bit_like_the_original(
    tmp_path: Path, kind: str, features: Features, columns: dict[str, NDArray[Any]]
) -> None:
    run = spec.parse(
        {"name": "pets", "data": {"source": "raw"}, "model": {"kind": kind, "dropout": 0.5}}
    )
    original = build(run.model, Signature(input_of(features), Classes(LABELS)))
    store = storage.connect(str(tmp_path))
    made = draft("pets", features, Classes(LABELS), spec=spec.dump(run))
    registry.publish(store, made, safetensors.torch.save(original.state_dict()))
    loaded = load_predictor(store, registry.resolve(store, "pets:1"))
    expected = predict(replace(loaded, network=original.eval()), columns)
    assert np.array_equal(predict(loaded, columns), expected)
    assert expected.sum(axis=1) == pytest.approx(1)
    assert len(np.unique(expected)) > len(LABELS)


def test_training_counts_errors_in_the_unit_of_the_data_as_evaluation_does() -> None:
    output = Numbers(("price", "rooms"), (1e5, 3.0), (8e4, 2.0))
    task = choose_task(Signature(Vector(2), output))
    values, targets = torch.randn(6, 2), torch.randn(6, 2)
    counter = NumberCounter(output)
    counter.add(values, targets, 0.0)
    told = counter.finish().metrics["mae"]
    assert task.count(values, targets)["mae"].item() / 12 == pytest.approx(told)


def count_numbers(targets: NDArray[np.float32], cuts: list[int]) -> NumberScores:
    """Scores of a model that always answers one more."""
    counter = NumberCounter(Numbers(("y",), (0.0,), (1.0,)))
    for part in np.split(targets, sorted(cuts)):
        column = torch.from_numpy(part[:, None])
        counter.add(column + 1, column, 0.0)
    return counter.finish()


@given(st.floats(-(2**100), 2**100, width=32), st.integers(1, 300), CUTS)
def test_equal_numbers_have_no_r2_however_they_are_batched(
    value: float, rows: int, cuts: list[int]
) -> None:
    scores = count_numbers(np.full(rows, value, np.float32), cuts)
    assert scores.r2 == (None,)
    assert "r2" not in scores.metrics


@pytest.mark.parametrize("mean", [0, 3_000, -5_000_000])
@pytest.mark.parametrize("first", [[], [1e7]], ids=["alike", "after an outlier"])
@given(cuts=CUTS)
def test_r2_is_that_of_a_direct_computation_far_from_zero_too(
    mean: int, first: list[float], cuts: list[int]
) -> None:
    near = mean + np.random.default_rng(0).integers(0, 3, 500)
    targets = np.array([*first, *near], np.float32)
    exact = targets.astype(np.float64)
    total = sum((exact - exact.mean()) ** 2)
    (told,) = count_numbers(targets, cuts).r2
    errors = (targets + np.float32(1)).astype(np.float64) - exact
    assert told == pytest.approx(1 - sum(errors**2) / total, rel=1e-9)
