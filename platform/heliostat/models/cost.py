"""What a network costs, measured on PyTorch's meta device: tensors with shapes but no values."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from heliostat.errors import HeliostatError
from heliostat.models import Task, build, count_parameters, task_of
from heliostat.models.dropout import find_dropouts, key_samples
from heliostat.models.example import example
from heliostat.signature import Series, Signature, Text
from heliostat.spec import CustomSpec, ModelSpec, RnnSpec

Costs = tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """What one more sample costs, in float32 and at the full length of a sequence.

    FLOPs are those of matrix products and convolutions, two for a multiplication and its addition:
    `flops_per_sample` forward, `train_flops_per_sample` forward and backward. The activations are
    what the backward pass, the loss included, keeps besides the parameters.
    """

    parameters: int
    flops_per_sample: int
    train_flops_per_sample: int
    activation_bytes_per_sample: int


def measure_cost(model: ModelSpec, signature: Signature) -> Cost:
    """Count what a training step does for two rows and take off what it does for one.

    What every batch needs once, as the parameters that are kept for the backward pass, cancels.

    Raises:
        HeliostatError: the family does not suit the data, or a user's own network looks at values.
    """
    task = task_of(model, signature)
    with torch.device("meta"):
        network = build(model, signature)
        try:
            measure = _measure_recurrent if isinstance(model, RnnSpec) else _measure_row
            costs = measure(network, task, signature)
        except (NotImplementedError, RuntimeError) as error:
            if not isinstance(model, CustomSpec):
                raise
            raise HeliostatError(
                f"the cost of model.build={model.build} cannot be measured, its network looks at "
                f"the values of tensors: {error}"
            ) from error
    return Cost(count_parameters(network), *costs)


def _measure_recurrent(network: nn.Module, task: Task, signature: Signature) -> Costs:
    """A series costs the same at every step: two short ones tell what a long one costs.

    On the meta device the fused kernels run as one matrix product for each step, and a thousand
    steps would take a minute.
    """
    of = signature.input
    assert isinstance(of, Series | Text)
    short, longer = (
        _measure_row(network, task, replace(signature, input=replace(of, length=length)))
        for length in (2, 3)
    )
    return tuple(
        cost + (of.length - 2) * (more - cost) for cost, more in zip(short, longer, strict=True)
    )


def _measure_row(network: nn.Module, task: Task, signature: Signature) -> Costs:
    one, two = (_measure_step(network, task, signature, rows) for rows in (1, 2))
    return tuple(after - before for before, after in zip(one, two, strict=True))


def _measure_step(network: nn.Module, task: Task, signature: Signature, rows: int) -> Costs:
    """FLOPs of the forward pass, of it and the backward pass, and bytes kept between them."""
    inputs, targets = example(signature, rows)
    kept: dict[int, Tensor] = {}
    with FlopCounterMode(display=False) as counter:
        with (
            key_samples(find_dropouts(network), torch.zeros(rows, dtype=torch.long)),
            _keeping(kept),
        ):
            loss = task.loss(network(*inputs), targets)
        forward = counter.get_total_flops()
        torch.autograd.backward(loss)
    kept_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return forward, counter.get_total_flops(), kept_bytes


@contextmanager
def _keeping(kept: dict[int, Tensor]) -> Iterator[None]:
    """Within, what autograd saves goes into `kept`, once for each storage: views share theirs."""

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield
