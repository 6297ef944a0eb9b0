"""The training loop, in PyTorch alone: batches in, one report a step out."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from heliostat.errors import HeliostatError
from heliostat.spec import OptimizerSpec, digest

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


@dataclass(frozen=True)
class Batch:
    """This rank's share of a global batch of `global_rows`; the share may be empty."""

    inputs: Tensor
    targets: Tensor
    global_rows: int


@dataclass(frozen=True)
class StepReport:
    """One finished step over all ranks; `loss` is the mean over the global batch."""

    step: int
    loss: float
    accuracy: float
    rows: int


def build_optimizer(spec: OptimizerSpec, model: nn.Module) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": spec.lr, "weight_decay": spec.weight_decay}
    if spec.kind == "sgd":
        settings["momentum"] = spec.momentum
    return _OPTIMIZERS[spec.kind](model.parameters(), **settings)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    *,
    first_step: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[StepReport]:
    """Train on `batches`, one optimiser step each, and report after each.

    The gradient is that of the mean over the global batch, however unevenly the ranks share it:
    each rank weights its sum by world_size / global_rows and data parallel averages over ranks.
    Random numbers are keyed by (seed, step, rank), so a resumed run needs no generator state.

    Raises:
        HeliostatError: the loss is NaN or infinite; the optimiser has not stepped on it.
    """
    model.train()
    for step, batch in enumerate(batches, start=first_step + 1):
        torch.manual_seed(int(digest([seed, step, rank])[:15], 16))
        logits = model(batch.inputs)
        loss_sum = functional.cross_entropy(logits, batch.targets, reduction="sum")
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss_sum * (world_size / batch.global_rows))
        correct = (logits.detach().argmax(dim=1) == batch.targets).sum()
        totals = torch.stack([loss_sum.detach().double(), correct.double()])
        if world_size > 1:
            torch.distributed.all_reduce(totals)
        loss, accuracy = (totals / batch.global_rows).tolist()
        if not math.isfinite(loss):
            raise HeliostatError(
                f"the loss became {loss} at step {step}: lower train.optimizer.lr "
                "or look for extreme values in the data"
            )
        optimizer.step()
        yield StepReport(step, loss, accuracy, batch.global_rows)


def dump_state(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, bytes]:
    """Everything a resumed run needs, as files without pickle; `load_state` is the inverse.

    Raises:
        HeliostatError: a weight is NaN or infinite; such a state is never written.
    """
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise HeliostatError(
                f"{name} has values that are not finite after step {step}: lower train.optimizer.lr"
            )
    document = optimizer.state_dict()
    tensors = {
        f"{parameter}.{name}": tensor.contiguous()
        for parameter, state in document["state"].items()
        for name, tensor in state.items()
        if tensor is not None
    }
    state = {"step": step, "param_groups": document["param_groups"]}
    return {
        MODEL: safetensors.torch.save(weights),
        OPTIMIZER: safetensors.torch.save(tensors),
        STATE: json.dumps(state).encode(),
    }


def load_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, files: Mapping[str, bytes]
) -> int:
    """Put a dumped state into `model` and `optimizer`; returns the step it was dumped after."""
    model.load_state_dict(safetensors.torch.load(files[MODEL]))
    state: dict[str, Any] = json.loads(files[STATE])
    slots: dict[int, dict[str, Tensor]] = {}
    for key, tensor in safetensors.torch.load(files[OPTIMIZER]).items():
        parameter, _, name = key.partition(".")
        slots.setdefault(int(parameter), {})[name] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": state["param_groups"]})
    return int(state["step"])
