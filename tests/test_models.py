"""Laws over the whole table of model families."""

import pytest
import safetensors.torch
import torch

from heliostat.errors import HeliostatError
from heliostat.models import MODELS, build, count_parameters
from heliostat.spec import CnnSpec, MlpSpec, ModelSpec, OptimizerSpec
from heliostat.train import loop

SPECS: dict[str, ModelSpec] = {
    "mlp": MlpSpec(kind="mlp", hidden=(32,)),
    "cnn": CnnSpec(kind="cnn", channels=(8,), hidden=32),
}
SHAPE, CLASSES = (3, 8, 8), 4


def test_every_family_is_under_the_laws() -> None:
    assert SPECS.keys() == MODELS.keys()


@pytest.mark.parametrize("kind", MODELS)
def test_overfits_eight_samples(kind: str) -> None:
    torch.manual_seed(0)
    model = build(SPECS[kind], SHAPE, CLASSES)
    optimizer = loop.build_optimizer(OptimizerSpec(kind="adam", lr=0.01), model)
    batch = loop.Batch(torch.randn(8, *SHAPE), torch.arange(8) % CLASSES, 8)
    losses = [report.loss for report in loop.fit(model, optimizer, [batch] * 60)]
    assert losses[0] > 1
    assert losses[-1] < 0.05


@pytest.mark.parametrize("kind", MODELS)
def test_weights_survive_a_round_trip_bit_for_bit(kind: str) -> None:
    model, other = (build(SPECS[kind], SHAPE, CLASSES) for _ in range(2))
    inputs = torch.randn(5, *SHAPE)
    assert not torch.equal(model(inputs), other(inputs))
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(model.state_dict())))
    assert torch.equal(model(inputs), other(inputs))
    assert count_parameters(model) == count_parameters(other) > 0


@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_without_rows_is_taken(kind: str) -> None:
    assert build(SPECS[kind], SHAPE, CLASSES)(torch.empty(0, *SHAPE)).shape == (0, CLASSES)


def test_a_convolution_over_a_table_is_refused() -> None:
    with pytest.raises(HeliostatError, match=r"cnn needs images.*rows of 57 numbers.*mlp"):
        build(SPECS["cnn"], (57,), CLASSES)


def test_an_image_too_small_for_the_stages_is_refused() -> None:
    deep = CnnSpec(kind="cnn", channels=(4, 4, 4, 4))
    with pytest.raises(HeliostatError, match="at most 3 stages"):
        build(deep, (1, 8, 8), CLASSES)
