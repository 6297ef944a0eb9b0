"""Optimisers and the learning rate: built by name, the rate a pure function of the step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from heliostat.spec import OptimizerSpec, ScheduleSpec

_KINDS: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[str, ...]]] = {
    "sgd": (torch.optim.SGD, ("momentum", "nesterov")),
    "rmsprop": (torch.optim.RMSprop, ("momentum", "alpha", "eps")),
    "adam": (torch.optim.Adam, ("betas", "eps")),
    "adamw": (torch.optim.AdamW, ("betas", "eps")),
}
# Fused over whole weights and over sharded ones: PyTorch has no fused SGD for the latter.
_FUSED = {False: {"sgd", "adam", "adamw"}, True: {"adam", "adamw"}}


def build_optimizer(spec: OptimizerSpec, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser over the parameters that are trained, fused where PyTorch has it.

    With `spec.decay=matrices` the parameters of one dimension (biases, norms) are not decayed.
    """
    kind, keys = _KINDS[spec.kind]
    settings: dict[str, Any] = {key: getattr(spec, key) for key in keys}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if spec.kind in _FUSED[any(isinstance(parameter, DTensor) for parameter in trained)]:
        settings["fused"] = True
    if spec.decay == "all":
        return kind(trained, lr=spec.lr, weight_decay=spec.weight_decay, **settings)
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return kind([group for group in groups if group["params"]], lr=spec.lr, **settings)


def rate_at(spec: ScheduleSpec, step: int, steps: int, drops: int = 0) -> float:
    """The learning rate of `step` (from 1) of `steps`, as a share of the optimiser's own.

    `drops` counts how often a plateau was met. Cosine: Loshchilov & Hutter 2017, equation 5
    without restarts; warm-up, stable, decay (wsd): Hu et al. 2024, section 4.
    """
    if step <= spec.warmup_steps:
        return step / spec.warmup_steps
    after, length = step - spec.warmup_steps, max(1, steps - spec.warmup_steps)
    match spec.kind:
        case "step":
            return float(spec.factor ** ((after - 1) // spec.every))
        case "linear":
            return _fall(min(1.0, after / length), spec.final)
        case "cosine":
            waves = (1 - math.cos(math.pi * min(1.0, after / length))) / 2
            return _fall(waves, spec.final)
        case "wsd":
            decay = min(spec.decay_steps, length)
            return _fall(min(1.0, max(0.0, (step - steps + decay) / decay)), spec.final)
        case "plateau":
            return float(spec.factor**drops)
        case _:
            return 1.0


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _fall(progress: float, final: float) -> float:
    return 1 - progress * (1 - final)
