"""Tiny runs of one and of several processes, whose checkpoints the tests compare."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, wait
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from heliostat.errors import HeliostatError
from heliostat.storage import connect
from heliostat.train import checkpoint
from heliostat.train.checkpoint import Retention
from heliostat.train.reader import read_newest
from heliostat.train.state import State, name_tensors
from heliostat.train.writer import Writer

RUN = "digits-1"
T = TypeVar("T")
Optimizer = Callable[..., torch.optim.Optimizer]


def adam(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05, fused=True)


def make_state(seed: int, wrap: str = "", optimizer: Optimizer = adam) -> State:
    """Five rows of a layer do not divide by two or three ranks, two rows leave one without."""
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2))
    model.register_buffer("scale", torch.tensor(float(seed)))
    if wrap == "ddp":
        model = DistributedDataParallel(model)
    if wrap == "fsdp":
        fully_shard(model[0])  # type: ignore[index]
        fully_shard(model)
    average = {
        name.removeprefix("module."): parameter.detach().clone().mul_(0.5)
        for name, parameter in model.named_parameters()
    }
    return State(model, optimizer(model.parameters()), average)


def train(state: State, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(6, 7, generator=torch.Generator().manual_seed(step))
        state.model(inputs).square().mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()


def whole(state: State) -> dict[str, Tensor]:
    """Every tensor of the state, gathered from all ranks."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in name_tensors(state).items()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def save(root: str, state: State, *steps: int) -> None:
    writer = Writer(connect(root), RUN, Retention(keep=9))
    for step in steps:
        writer.begin(step, state, {"epoch": step})
    writer.finish()


@contextmanager
def joined(place: str, rank: int, world_size: int) -> Iterator[None]:
    """Within, this process is a rank; `place` is a path that only these ranks use."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{place}", timedelta(seconds=60), rank=rank, world_size=world_size
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()


def run(
    pool: Sequence[Executor], act: Callable[..., T], place: Path, world_size: int, *given: str
) -> list[T]:
    """What `act(place, rank, world_size, *given)` returns on each rank; `pool` has one per rank."""
    place.parent.mkdir(exist_ok=True, parents=True)
    tasks = [
        executor.submit(act, str(place), rank, world_size, *given)
        for rank, executor in enumerate(pool[:world_size])
    ]
    wait(tasks)
    return [task.result() for task in tasks]


def save_on_ranks(
    place: str, rank: int, world_size: int, wrap: str, root: str
) -> dict[str, Tensor]:
    with joined(place, rank, world_size):
        state = make_state(0, wrap)
        train(state, range(2))
        save(root, state, 2)
        return whole(state)


def load_on_ranks(
    place: str, rank: int, world_size: int, wrap: str, root: str
) -> dict[str, Tensor]:
    with joined(place, rank, world_size):
        state = make_state(1, wrap)
        assert read_newest(connect(root), RUN, state) is not None
        return whole(state)


def load_damaged(place: str, rank: int, world_size: int, root: str, name: str) -> tuple[int, str]:
    """Two checkpoints, the newer one damaged at the end of `name`, for a rank's file in a shard
    that no other rank reads: the step found, and what is said."""
    said: list[str] = []
    with joined(place, rank, world_size):
        state = make_state(0, "fsdp")
        train(state, range(1))
        save(root, state, 1, 2)
        if rank == 0:
            newest = checkpoint.committed(connect(root), RUN)[0]
            flip(Path(root, newest, name), -1)
        distributed.barrier()
        restored = read_newest(connect(root), RUN, make_state(1, "fsdp"), said.append)
    assert restored is not None
    return restored.step, " ".join(said)


def save_poisoned(place: str, rank: int, world_size: int, root: str) -> tuple[str, list[str]]:
    """One rank's part of the weights is NaN: what each rank is told, and what is committed."""
    with joined(place, rank, world_size):
        state = make_state(0, "fsdp")
        train(state, range(1))
        if rank == 1:
            weight = next(state.model.parameters())
            assert isinstance(weight, DTensor)
            weight.to_local().detach()[0, 0] = torch.nan
        try:
            save(root, state, 1)
        except HeliostatError as error:
            distributed.barrier()
            left = [entry.key for entry in connect(root).list("runs/")]
            return str(error), left
    raise AssertionError("the checkpoint was written")


def flip(path: Path, place: int | None = None) -> None:
    """One bit, in the middle or in the byte at `place`."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    os.unlink(path)
