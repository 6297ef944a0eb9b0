"""What a run keeps from step to step is refused before it is made, if it alone is too much."""

import pytest
import torch

from heliostat.errors import HeliostatError
from heliostat.models import build, count_parameters
from heliostat.signature import Classes, Signature, Vector
from heliostat.spec import MlpSpec, OptimizerSpec, TrainSpec
from heliostat.train import room
from heliostat.train.optim import build_optimizer
from heliostat.train.room import refuse_what_cannot_fit

CPU = torch.device("cpu")
SIGNATURE = Signature(Vector(10), Classes(("a", "b")))
SMALL = MlpSpec(kind="mlp", hidden=(8,))
HUGE = MlpSpec(kind="mlp", hidden=(2_000_000, 2_000_000))


def test_what_is_too_large_is_refused_and_never_made() -> None:
    """Its weights alone are 16 TB: whoever made them would not live to say so."""
    with pytest.raises(HeliostatError, match=r"^the 4,000,028,000,002 weights with gradients and "):
        refuse_what_cannot_fit(HUGE, SIGNATURE, TrainSpec(), CPU)


def test_sharding_takes_a_share() -> None:
    network = build(SMALL, SIGNATURE)
    kept = 4 * 4 * count_parameters(network)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_count_all", lambda device, neighbours: kept // 2)
        refuse_what_cannot_fit(SMALL, SIGNATURE, TrainSpec(strategy="fsdp"), CPU, world_size=2)
        with pytest.raises(HeliostatError, match=r"train\.strategy=fsdp"):
            refuse_what_cannot_fit(SMALL, SIGNATURE, TrainSpec(), CPU, world_size=2)


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerSpec(kind="sgd"),
        OptimizerSpec(kind="sgd", momentum=0.9),
        OptimizerSpec(kind="rmsprop"),
        OptimizerSpec(kind="rmsprop", momentum=0.9),
        OptimizerSpec(kind="adam"),
        OptimizerSpec(kind="adamw"),
    ],
    ids=lambda optimizer: f"{optimizer.kind}-{optimizer.momentum}",
)
def test_an_optimizer_keeps_as_many_moments_as_is_said(optimizer: OptimizerSpec) -> None:
    network = build(SMALL, SIGNATURE)
    made = build_optimizer(optimizer, network)
    for weight in network.parameters():
        weight.grad = torch.ones_like(weight)
    made.step()
    kept = sum(
        tensor.numel()
        for state in made.state.values()
        for tensor in state.values()
        if torch.is_tensor(tensor) and tensor.numel() > 1
    )
    moments = room.MOMENTS[optimizer.kind] + (optimizer.momentum > 0)
    assert kept == moments * count_parameters(network)
