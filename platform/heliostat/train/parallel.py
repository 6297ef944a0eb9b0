"""What is applied to a network from outside: recomputation, compilation, precision, data parallel.

Always in this order: each of the first two wraps the `forward` that the one before left, so both
lie inside the hooks of what shares the network over workers, and no parameter changes its name.
"""

import contextlib
import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from heliostat.errors import HeliostatError
from heliostat.models import Task
from heliostat.spec import TrainSpec

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]

LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}
# The loss in fp16 is first multiplied by this, and by twice of it after every 2,000 good steps: 64
# times less than PyTorch begins with, because a step that overflows is a batch nobody learns from.
FIRST_SCALE = 2.0**10
CARRIED = 32
BUCKET_MIB = 25  # PyTorch's own, but for the first bucket, which would be one of 1 MiB


@dataclass(frozen=True)
class Parallel:
    """A network as the loop trains it; `task`, `autocast` and `scaler` are the loop's as well.

    The network that `parallelize` was given keeps its names and is what is saved and averaged.
    """

    model: nn.Module
    task: Task
    autocast: Autocast
    scaler: torch.amp.GradScaler


def parallelize(
    model: nn.Module, task: Task, spec: TrainSpec, device: torch.device, world_size: int = 1
) -> Parallel:
    """Change `model` in place and move it to `device`; build the optimiser after it.

    Over more than one worker the process group exists, and every worker built the same weights:
    `ddp` takes them from the first, `fsdp` from each its own part.

    Raises:
        HeliostatError: this machine cannot train in `spec.precision` or compile.
    """
    _check_precision(spec.precision, device)
    blocks = find_blocks(model)
    if spec.recompute:
        recompute(model)
    if spec.compile:
        _check_compiler()
        for block in blocks or [model]:
            _wrap(block, torch.compile)
        task = replace(task, loss=torch.compile(task.loss))
    dtype = LOW_PRECISION.get(spec.precision)
    share = _STRATEGIES[spec.strategy] if world_size > 1 else _keep_whole
    return Parallel(
        share(model, blocks, device, dtype),
        task,
        functools.partial(torch.autocast, device.type, dtype, enabled=dtype is not None),
        torch.amp.GradScaler(device.type, FIRST_SCALE, enabled=dtype is torch.float16),
    )


def recompute(model: nn.Module) -> None:
    """Nothing inside a block, or a child where there are none, is kept for the backward pass."""
    for block in find_blocks(model) or list(model.children()):
        _wrap(block, _recompute)


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a deep network, those of its list `layers`; none in others."""
    layers = getattr(model, "layers", None)
    return list(layers) if isinstance(layers, nn.ModuleList) else []


@contextlib.contextmanager
def synced(model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients of the backward pass within are exchanged if it is the `last` one of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def backward(
    model: nn.Module, loss: Tensor, numbers: Tensor, world_size: int
) -> Callable[[], list[float]]:
    """The backward pass that exchanges gradients, and how to get the sums of `numbers` over ranks.

    There are at most CARRIED, and they travel while it runs: under DDP in the same message, as
    float32.
    """
    if isinstance(model, DistributedDataParallel):
        seat = model.module.seat
        seat.grad, carried = None, torch.zeros_like(seat)
        carried[: len(numbers)] = numbers
        torch.autograd.backward([loss, seat], [None, carried])
        return lambda: (seat.grad * world_size).tolist()[: len(numbers)]
    sending = distributed.all_reduce(numbers, async_op=True) if world_size > 1 else None
    torch.autograd.backward(loss)

    def collect() -> list[float]:
        if sending is not None:
            sending.wait()
        found: list[float] = numbers.tolist()
        return found

    return collect


class _Carrier(nn.Module):
    """A network, and the seat of numbers that data parallel takes along with its gradients: a
    message of their own would cost a small network a twentieth of each step."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.seat = nn.Parameter(torch.zeros(CARRIED, device=device))
        self.network = network

    def forward(self, *inputs: Tensor) -> Any:
        return self.network(*inputs)


def _keep_whole(
    model: nn.Module, blocks: list[nn.Module], device: torch.device, dtype: torch.dtype | None
) -> nn.Module:
    return model.to(device)


def _replicate(
    model: nn.Module, blocks: list[nn.Module], device: torch.device, dtype: torch.dtype | None
) -> nn.Module:
    # Buffers are constants in networks without batch statistics: nothing to send at each forward.
    return DistributedDataParallel(
        _Carrier(model.to(device), device),
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
        bucket_cap_mb=BUCKET_MIB,
    )


def _shard(
    model: nn.Module, blocks: list[nn.Module], device: torch.device, dtype: torch.dtype | None
) -> nn.Module:
    """FSDP2: each block gathers its own weights, what is left of the network is one more block.

    Weights travel in `dtype`, gradients in float32. Autocast stays on: it is what lets a network
    mix float32 constants with such weights.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(dtype, torch.float32)
    for block in [*blocks, model]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return model.to(device)


_STRATEGIES = {"ddp": _replicate, "fsdp": _shard}


def _wrap(module: nn.Module, wrapper: Callable[[Any], Callable[..., Any]]) -> None:
    """Replace the module's `forward`, not the module: hooks and names of parameters stay."""
    module.__dict__["forward"] = wrapper(module.forward)


def _recompute(forward: Callable[..., Any]) -> Callable[..., Any]:
    """What `forward` computed is not kept for the backward pass but computed again."""
    return functools.partial(checkpoint, forward, use_reentrant=False)


def _check_precision(precision: str, device: torch.device) -> None:
    if precision != "bf16" or device.type != "cuda":
        return
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise HeliostatError(
            f"train.precision=bf16 needs a GPU of compute capability 8.0 (A100) or later, here is "
            f"{torch.cuda.get_device_name(device)}: set train.precision=fp16"
        )


def _check_compiler() -> None:
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise HeliostatError(
            f"train.compile=true needs a C++ compiler and a worker has no {compiler}: install one "
            "(on Debian `apt-get install g++`) or set train.compile=false"
        )
