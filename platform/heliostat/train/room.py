"""The memory that a worker finds, and whether what a run keeps from step to step fits into it."""

from contextlib import suppress
from pathlib import Path

import psutil
import torch

from heliostat.environment import GIB
from heliostat.errors import HeliostatError
from heliostat.models import build, count_parameters
from heliostat.signature import Signature
from heliostat.spec import ModelSpec, TrainSpec

FLOAT = 4
# Numbers that an optimiser keeps for a weight, a momentum not counted.
MOMENTS = {"sgd": 0, "rmsprop": 1, "adam": 2, "adamw": 2}
# A container's limit and its use of it, in version 2 and 1 of cgroups.
CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def count_free(device: torch.device, neighbours: int) -> int:
    """Bytes for this worker, of which there are `neighbours` on its machine."""
    there = _AVAILABLE[device.type](device)
    return there // neighbours if device.type == "cpu" else there


def refuse_what_cannot_fit(
    model: ModelSpec,
    signature: Signature,
    train: TrainSpec,
    device: torch.device,
    *,
    world_size: int = 1,
    neighbours: int = 1,
) -> None:
    """Before any of it is made: weights, gradients, moments and moving average, without a row.

    Raises:
        HeliostatError: they alone take more than there is.
    """
    with suppress(NotImplementedError, RuntimeError), torch.device("meta"):
        # A network of the user's own may look at values, which there are none of.
        weights = count_parameters(build(model, signature))
        optimizer = train.optimizer
        copies = 2 + MOMENTS[optimizer.kind] + (optimizer.momentum > 0) + (train.ema is not None)
        share = world_size if train.strategy == "fsdp" else 1
        needed, there = FLOAT * weights * copies // share, _count_all(device, neighbours)
        if needed > there:
            raise HeliostatError(
                f"the {weights:,} weights with gradients and {optimizer.kind}'s moments take "
                f"{needed / GIB:.1f} GiB, a worker has {there / GIB:.1f} GiB: set "
                "train.strategy=fsdp over more machines, or make the model smaller "
                "(`heliostat plan` says what fits where)"
            )


def _count_free_cuda(device: torch.device) -> int:
    """Bytes of the GPU that are free or PyTorch's already."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def _count_free_cpu(device: torch.device) -> int:
    """Bytes of the machine that are free, within the limit of the container."""
    limits = [limit - int(used.read_text()) for limit, used in _list_limits()]
    return int(min([psutil.virtual_memory().available, *limits]))


def _count_all(device: torch.device, neighbours: int) -> int:
    """Bytes for this worker if nobody else were there."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return int(min([psutil.virtual_memory().total, *(limit for limit, _ in _list_limits())])) // (
        neighbours
    )


def _list_limits() -> list[tuple[int, Path]]:
    """Those of the container in bytes, each with the file that says what is used of it."""
    return [
        (int(limit.read_text()), used)
        for limit, used in CGROUPS
        if limit.exists() and limit.read_text().strip().isdigit()
    ]


_AVAILABLE = {"cuda": _count_free_cuda, "cpu": _count_free_cpu}
