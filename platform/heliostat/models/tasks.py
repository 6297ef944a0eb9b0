"""What a network is trained for: its loss and what is counted of its answers.

A loss is a sum over units (rows, numbers, tokens), and the mean over a global batch divides by the
units of that whole batch: it is the same however its rows are spread over workers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from heliostat.signature import Blocks, Classes, Numbers, Signature

Counts = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """`loss` (outputs, targets) is summed; `count` gives sums of metrics over the same units.

    `width` is how many outputs the head has. A row weighs 1, or what its column `weight` says; the
    sums have `units` terms for each weight.
    """

    name: str
    width: int
    units: int
    loss: Callable[[Tensor, Tensor], Tensor]
    count: Callable[[Tensor, Tensor], Counts]


def choose_task(signature: Signature, loss: str = "auto") -> Task:
    """The task of a signature; `loss` is what the model section says.

    Raises:
        ValueError: `bce` for anything but two classes.
    """
    output = signature.output
    if isinstance(output, Classes):
        return _binary(output) if loss == "bce" else _classification(output)
    if loss != "auto":
        raise ValueError(f"model.loss={loss} needs classes, the data has none")
    if isinstance(output, Numbers):
        return _regression(output)
    assert isinstance(signature.input, Blocks)
    return _language(signature.input)


def _classification(output: Classes) -> Task:
    return Task(
        "classification",
        len(output.labels),
        1,
        lambda logits, targets: functional.cross_entropy(logits.float(), targets, reduction="sum"),
        lambda logits, targets: {"accuracy": (logits.argmax(dim=1) == targets).sum()},
    )


def _binary(output: Classes) -> Task:
    if len(output.labels) != 2:
        raise ValueError(f"model.loss=bce needs two classes, the data has {len(output.labels)}")
    return Task(
        "binary",
        1,
        1,
        lambda logits, targets: functional.binary_cross_entropy_with_logits(
            logits[:, 0].float(), targets.float(), reduction="sum"
        ),
        lambda logits, targets: {"accuracy": ((logits[:, 0] > 0) == targets).sum()},
    )


def _regression(output: Numbers) -> Task:
    std = torch.tensor(output.std)

    def sum_errors(values: Tensor, targets: Tensor) -> Tensor:
        """In the unit of the data, as `evaluate` has them and a stop is written."""
        return ((values - targets).abs() * std.to(targets.device)).sum()

    return Task(
        "regression",
        len(output.names),
        len(output.names),
        lambda values, targets: functional.mse_loss(values.float(), targets, reduction="sum"),
        lambda values, targets: {"mae": sum_errors(values, targets)},
    )


def _language(blocks: Blocks) -> Task:
    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        targets = following(tokens, blocks.end).flatten()
        return functional.cross_entropy(
            logits.flatten(0, 1).float(), targets, ignore_index=-1, reduction="sum"
        )

    # Nothing is counted: another pass over the logits costs a training step more than it tells.
    return Task("language", blocks.vocab, 1, loss, lambda logits, tokens: {})


def following(tokens_NT: Tensor, end: int) -> Tensor:
    """The next token of each position, -1 where there is none: at the block's or document's end."""
    shifted = torch.full_like(tokens_NT, -1)
    shifted[:, :-1] = tokens_NT[:, 1:]
    return shifted.masked_fill_(tokens_NT == end, -1)
