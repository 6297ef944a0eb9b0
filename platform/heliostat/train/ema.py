"""An exponential moving average of the weights, beside the weights that are trained."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """`tensors` are the averages by name: decay * average + (1 - decay) * weight at each update."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._weights = dict(model.named_parameters())
        self._decay = decay
        self.tensors: dict[str, Tensor] = {
            name: weight.detach().clone() for name, weight in self._weights.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        weights: list[Tensor] = list(self._weights.values())
        torch._foreach_lerp_(list(self.tensors.values()), weights, 1 - self._decay)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, average in self.tensors.items():
            average.copy_(tensors[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model has the averages as its weights."""
        with torch.no_grad():
            kept = {name: weight.clone() for name, weight in self._weights.items()}
            _copy(self.tensors, self._weights)
            try:
                yield
            finally:
                _copy(kept, self._weights)


def _copy(source: dict[str, Tensor], target: dict[str, nn.Parameter]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)
