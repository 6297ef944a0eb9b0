"""Laws of attributions: they sum to what they explain, name what matters, and nothing else."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.modules.module import register_module_forward_pre_hook

from heliostat.data.features import Columns, ImageFeatures, input_of
from heliostat.data.instances import parse_instances
from heliostat.errors import HeliostatError
from heliostat.evaluate import Predictor, predict
from heliostat.explain import (
    MAX_STEPS,
    MIN_STEPS,
    Explanation,
    explain,
    plan_steps,
    plan_window,
)
from heliostat.models import build
from heliostat.signature import Signature
from heliostat.spec import MlpSpec
from serving import EVERY, LABELS

RANDOM = np.random.default_rng(0)
ROWS: dict[str, Any] = {
    "shapes": RANDOM.integers(0, 256, (4, 4)).tolist(),
    "photos": RANDOM.integers(0, 256, (8, 8, 3)).tolist(),
    "people": {"age": 55, "job": "smith"},
    "signs": {"age": None, "job": "cook"},
    "prices": {"age": 23, "job": None},
    "sounds": [[1.0, 2.0], [None, 0.5], [3.0, -1.0]],
    "mails": "the lazy dog jumps",
    "tweets": "over the quick brown fox",
    "ratings": {"user": "2", "item": "a", "age": 31},
}


def row_of(name: str, instance: Any = None) -> Columns:
    features = EVERY[name].predictor.features
    return parse_instances(features, [ROWS[name] if instance is None else instance])


def total(explanation: Explanation) -> float:
    found = explanation.attributions
    if isinstance(found, dict):
        return float(sum(found.values()))
    if isinstance(found, list):
        return float(sum(token["attribution"] for token in found))
    return float(found.sum())


def make_linear(name: str) -> Predictor:
    """The predictor of `name` with one layer, whose weights are the attributions per unit."""
    predictor = EVERY[name].predictor
    torch.manual_seed(1)
    signature = Signature(input_of(predictor.features), predictor.output)
    network = build(MlpSpec(kind="mlp", hidden=()), signature).eval()
    return replace(predictor, network=network)


@pytest.mark.parametrize("name", EVERY)
def test_attributions_sum_to_the_change_from_the_baseline(name: str) -> None:
    explanation = explain(EVERY[name].predictor, row_of(name))
    change = explanation.score - explanation.baseline_score
    assert abs(change) > 1e-6
    assert abs(explanation.gap) <= 0.02 * abs(change) + 1e-6
    assert total(explanation) == pytest.approx(change + explanation.gap, abs=1e-5)


@pytest.mark.parametrize("name", ["shapes", "photos", "people"])
def test_a_linear_model_is_explained_exactly(name: str) -> None:
    predictor = make_linear(name)
    explanation = explain(predictor, row_of(name), target=LABELS[1])
    weight = predictor.network.get_parameter("1.weight").detach().numpy()[1].astype(np.float64)
    found = explanation.attributions
    if name == "people":
        assert found["age"] == pytest.approx(weight[0] * 1.5, rel=1e-4)
        assert found["job"] == pytest.approx(weight[3] - weight[4], rel=1e-4)
    else:
        features = predictor.features
        assert isinstance(features, ImageFeatures)
        pixels = row_of(name)["image"][0].transpose(2, 0, 1) / 255
        expected = weight.reshape(pixels.shape) * (pixels - 0.5) / 0.25
        assert found == pytest.approx(expected.sum(axis=0), rel=1e-3, abs=1e-5)
    assert explanation.steps == MIN_STEPS
    assert explanation.gap == pytest.approx(0, abs=1e-4)


class Blind(torch.nn.Module):
    """Looks at the first half of each row."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, *lengths: torch.Tensor) -> torch.Tensor:
        seen = x.clone()
        seen[:, x.shape[1] // 2 :] = 0
        return self.network(seen, *lengths)  # type: ignore[no-any-return]


def test_what_the_network_ignores_has_no_attribution() -> None:
    for name, ignored in (("people", "job"), ("sounds", np.s_[1:])):
        predictor = EVERY[name].predictor
        blind = replace(predictor, network=Blind(predictor.network))
        found = explain(blind, row_of(name)).attributions
        assert np.all(found[ignored] == 0)
        assert np.any(np.array(found["age"] if name == "people" else found[0]) != 0)


def test_the_predicted_class_is_explained_unless_another_is_asked_for() -> None:
    predictor, row = EVERY["people"].predictor, row_of("people")
    chosen = explain(predictor, row).target
    scores = {label: explain(predictor, row, target=label).score for label in LABELS}
    assert scores[chosen] == max(scores.values())
    with pytest.raises(HeliostatError, match="the targets are no, yes, perhaps"):
        explain(predictor, row, target="maybe")


def test_a_number_is_explained_in_the_units_of_the_data() -> None:
    predictor, row = EVERY["prices"].predictor, row_of("prices")
    explanation = explain(predictor, row, target="high")
    assert explanation.score == pytest.approx(float(predict(predictor, row)[0, 1]), rel=1e-5)


def test_tokens_have_their_place_in_the_text() -> None:
    for name in ("mails", "tweets"):
        text = ROWS[name]
        found = explain(EVERY[name].predictor, row_of(name)).attributions
        assert "".join(text[token["start"] : token["end"]] for token in found) == text


@pytest.mark.parametrize("window", [1, 3, 8])
def test_occlusion_covers_every_pixel_once(window: int) -> None:
    explanation = explain(
        make_linear("photos"), row_of("photos"), method="occlusion", window=window
    )
    assert explanation.steps == math.ceil(8 / window) ** 2
    assert explanation.gap == pytest.approx(0, abs=1e-4)
    assert explanation.attributions.shape == (8, 8)


def test_occlusion_is_for_images() -> None:
    with pytest.raises(HeliostatError, match="occlusion is for images"):
        explain(EVERY["people"].predictor, row_of("people"), method="occlusion")


def test_without_time_there_are_few_steps_and_they_are_told() -> None:
    explanation = explain(EVERY["sounds"].predictor, row_of("sounds"), seconds_left=lambda: 0.0)
    assert explanation.steps == MIN_STEPS


def test_the_modules_that_predict_are_left_alone() -> None:
    """Captum hangs hooks on modules while it works: on others than these."""
    predictor = EVERY["mails"].predictor
    hooks: list[int] = []

    def look(module: torch.nn.Module, inputs: Any) -> None:
        hooks.extend(len(own._forward_hooks) for own in predictor.network.modules())

    handle = register_module_forward_pre_hook(look)
    try:
        explain(predictor, row_of("mails"))
    finally:
        handle.remove()
    assert hooks
    assert not any(hooks)
    assert all(weight.requires_grad for weight in predictor.network.parameters())


@given(
    steps=st.integers(MIN_STEPS, MAX_STEPS),
    seconds=st.floats(0, 10),
    gap=st.floats(-10, 10),
    difference=st.floats(-10, 10),
    left=st.floats(-1, 10),
)
def test_more_steps_are_planned_only_if_they_help_and_fit(
    steps: int, seconds: float, gap: float, difference: float, left: float
) -> None:
    more = plan_steps(steps, seconds, gap, difference, left)
    if more is not None:
        assert steps < more <= MAX_STEPS
        assert seconds * more / steps <= left * (1 + 1e-9)
        assert gap != 0


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    window=st.integers(1, 300),
    seconds=st.floats(0, 1),
    left=st.floats(-1, 5),
)
def test_squares_grow_until_there_is_time_for_them(
    height: int, width: int, window: int, seconds: float, left: float
) -> None:
    side = plan_window(height, width, window, seconds, left)
    assert side >= window
    if side > window:
        assert side < 2 * max(height, width)
