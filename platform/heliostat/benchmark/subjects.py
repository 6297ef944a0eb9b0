"""The networks that the servers of a benchmark answer with, and the image they are asked about."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from heliostat.benchmark.published import publish
from heliostat.data.features import ImageFeatures, input_of
from heliostat.models import build
from heliostat.registry import Version
from heliostat.signature import Classes, Signature
from heliostat.spec import CnnSpec, MlpSpec, ModelSpec
from heliostat.storage import Store

CLASSES = Classes(tuple(map(str, range(10))))


@dataclass(frozen=True)
class Subject:
    """A network over pixels in 0..255, which are sent with so many `decimals`."""

    name: str
    model: ModelSpec
    features: ImageFeatures
    decimals: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """That of one image, (1, height, width, channels)."""
        return 1, self.features.height, self.features.width, self.features.channels

    @property
    def image(self) -> NDArray[np.float64]:
        """One image (1, height, width, channels), the same every time."""
        pixels = np.random.default_rng(0).uniform(0, 255, self.shape)
        return pixels.round(self.decimals)

    @property
    def instances(self) -> list[Any]:
        """The same as in JSON: lists, where a pixel of one channel is a number."""
        image = self.image if self.decimals else self.image.astype(int)
        pixels = image.squeeze(3) if self.features.channels == 1 else image
        instances: list[Any] = pixels.tolist()
        return instances


MLP = Subject(
    "mlp", MlpSpec(kind="mlp", hidden=(128, 64)), ImageFeatures(28, 28, 1, (0.29,), (0.35,)), 2
)
LENET = Subject(
    "lenet",
    CnnSpec(kind="cnn", channels=(6, 16), kernel=5, padding="valid", hidden=(120, 84)),
    ImageFeatures(32, 32, 3, (0.5, 0.45, 0.4), (0.25, 0.25, 0.25)),
    0,
)


class Whole(nn.Module):
    """From pixels (N, height, width) or (N, height, width, channels) to probabilities."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, features: ImageFeatures) -> None:
        super().__init__()
        self.network, self.size = network, (features.height, features.width, features.channels)
        mean, std = torch.tensor(features.mean), torch.tensor(features.std)
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, pixels: Tensor) -> Tensor:
        x_NHWC = pixels.reshape(-1, *self.size) * self.scale + self.shift
        probabilities: Tensor = self.network(x_NHWC.permute(0, 3, 1, 2)).softmax(1)
        return probabilities


def build_network(subject: Subject) -> nn.Module:
    torch.manual_seed(0)
    return build(subject.model, Signature(input_of(subject.features), CLASSES)).eval()


def publish_subject(store: Store, subject: Subject) -> Version:
    network = build_network(subject)
    return publish(store, subject.name, subject.model, subject.features, CLASSES, network)


def save_script(subject: Subject, path: Path) -> None:
    """The whole of it as TorchScript, frozen, which a server loads without code of ours."""
    whole = Whole(build_network(subject), subject.features).eval()
    example = torch.from_numpy(subject.image).float()
    torch.jit.freeze(torch.jit.trace(whole, example)).save(str(path))  # type: ignore[no-untyped-call]
