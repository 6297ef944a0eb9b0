"""What a user's job may bring: a network that cannot run on an empty batch, and a loss."""

from typing import Any

import torch
from torch import Tensor, nn

from heliostat.models.dropout import Dropout
from heliostat.signature import Classes, Picture, Signature


class Net(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.first, self.drop = nn.Linear(inputs, hidden), Dropout(dropout)
        self.last = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.drop(torch.tanh(self.first(x.view(x.size(0), -1)))))
        return outputs


def build(signature: Signature, hidden: int, dropout: float = 0.0, extra: int = 0) -> nn.Module:
    of, output = signature.input, signature.output
    assert isinstance(of, Picture)
    assert isinstance(output, Classes)
    return Net(of.channels * of.height * of.width, hidden, len(output.labels) + extra, dropout)


class Peeking(nn.Module):
    """It looks at the values of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.last(x if float(x.sum()) > 0 else -x)
        return outputs


def build_peeking(signature: Signature) -> nn.Module:
    return Peeking()


def build_nothing(signature: Signature) -> dict[str, Any]:
    return {"signature": signature}


def focal_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
    return (1 - torch.exp(-losses)) * losses


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return focal_loss(outputs, targets).mean()


def row_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().sum(dim=1)


not_a_function = 3
