"""Dropout whose noise belongs to the sample, not to the worker or the micro batch it lands in."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# The finaliser of SplitMix64 (Steele, Lea & Flood 2014) as signed numbers, and its increment.
_MULTIPLY = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))
_INCREMENT = -0x61C8864680B583EB
_BITS = 24


class Dropout(nn.Module):
    """`nn.Dropout` that draws for each sample from the key it is given by `key_samples`.

    Without keys, as when a user trains the network in a loop of their own, it is `nn.Dropout`.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.keys: Tensor | None = None

    def forward(self, x_N: Tensor) -> Tensor:
        if not self.training or not self.share:
            return x_N
        if self.keys is None:
            return nn.functional.dropout(x_N, self.share)
        row = x_N.shape[1:]
        places = torch.arange(math.prod(row), device=x_N.device).view(1, *row)
        keys = self.keys.view(-1, *[1] * (x_N.ndim - 1))
        kept = mix(keys + places * _INCREMENT) & (2**_BITS - 1) >= int(self.share * 2**_BITS)
        return torch.mul(x_N, (kept / (1 - self.share)).to(x_N.dtype))


def find_dropouts(model: nn.Module) -> list[Dropout]:
    """Those that drop anything."""
    return [module for module in model.modules() if isinstance(module, Dropout) and module.share]


@contextmanager
def key_samples(layers: Sequence[Dropout], keys_N: Tensor) -> Iterator[None]:
    """Within, each of `layers` draws for sample n from keys_N[n], int64, and its place."""
    for salt, layer in enumerate(layers):
        # As a tensor, because a Python product would not wrap around at 64 bits.
        layer.keys = mix(keys_N + torch.tensor(salt) * _INCREMENT)
    try:
        yield
    finally:
        for layer in layers:
            layer.keys = None


def mix(x: Tensor) -> Tensor:
    """A bijection of int64 in which every bit of the input changes half of the output's."""
    for shift, factor in _MULTIPLY:
        x = (x ^ _shift(x, shift)) * factor
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left, as for unsigned numbers."""
    return torch.bitwise_and(x >> bits, 2 ** (64 - bits) - 1)
