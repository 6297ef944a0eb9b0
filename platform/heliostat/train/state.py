"""Everything that a resumed run needs, as files without pickle."""

import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from heliostat.errors import HeliostatError

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


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
