"""Batches made of nothing but a signature: to measure a network before there is data."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from heliostat.signature import (
    Blocks,
    Classes,
    Input,
    Interaction,
    Numbers,
    Picture,
    Series,
    Signature,
    Text,
    Vector,
)


def example(signature: Signature, rows: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Inputs and targets of `rows` rows, as long as rows can be, on the default device."""
    inputs = _inputs(signature.input, rows)
    match signature.output:
        case Classes():
            return inputs, torch.zeros(rows, dtype=torch.int64)
        case Numbers(names):
            return inputs, torch.zeros(rows, len(names))
        case _:
            return inputs, inputs[0]


def is_hollow(tensor: Tensor) -> bool:
    """Whether it has a shape but no values, as where a network is only measured."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _inputs(shape: Input, rows: int) -> tuple[Tensor, ...]:
    match shape:
        case Vector(width):
            return (torch.zeros(rows, width),)
        case Picture(channels, height, width):
            return (torch.zeros(rows, channels, height, width),)
        case Series(length, channels):
            return torch.zeros(rows, length, channels), torch.full((rows,), length)
        case Text(length, _):
            return torch.zeros(rows, length, dtype=torch.int64), torch.full((rows,), length)
        case Blocks(length, vocab, end):
            # One document that fills the block, of a token that is not the end of it.
            return (torch.full((rows, length), (end + 1) % vocab),)
        case Interaction(ids, width):
            return torch.zeros(rows, len(ids), dtype=torch.int64), torch.zeros(rows, width)
