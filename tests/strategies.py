"""Processes that train a small network together, by every strategy, and tell what they saw."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.nn import functional

from heliostat.data.order import share
from heliostat.models import Task, build, task_of
from heliostat.models.dropout import Dropout
from heliostat.signature import Classes, Signature, Vector
from heliostat.spec import MlpSpec, OptimizerSpec, TrainSpec
from heliostat.train import loop, room
from heliostat.train.micro_batch import fit_micro_batch
from heliostat.train.optim import build_optimizer
from heliostat.train.parallel import parallelize

CPU = torch.device("cpu")
WIDTH, CLASSES = 6, 3
SIGNATURE = Signature(Vector(WIDTH), Classes(tuple(map(str, range(CLASSES)))))
MLP = MlpSpec(kind="mlp", hidden=(16, 5), dropout=0.2)
TASK = task_of(MLP, SIGNATURE)
ROWS = (8, 7, 2, 5, 1)
OPTIMIZER = OptimizerSpec(kind="sgd", lr=0.1, momentum=0.9)
ROOM_BYTES = 10**6
CLIP_NORM, MICRO_BATCH, TIMEOUT = 0.5, 2, timedelta(seconds=60)


Step = tuple[float, ...]  # the loss, the norm of the gradient, what the ranks said in sum
Seen = dict[str, Any]


@dataclass(frozen=True)
class Case:
    network: str
    strategy: str
    precision: str
    recompute: bool
    compile: bool
    world_size: int

    def __str__(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(width), Dropout(0.1)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_NTD: Tensor) -> Tensor:
        q_NTD, k_NTD, v_NTD = self.mix(self.norm(x_NTD)).chunk(3, dim=-1)
        seen_NTD = functional.scaled_dot_product_attention(q_NTD, k_NTD, v_NTD, is_causal=True)
        residual: Tensor = x_NTD + self.dropout(self.out(seen_NTD))
        return residual


class Deep(nn.Module):
    """A small transformer: each number of a row is a token."""

    def __init__(self, width: int = 8, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(1, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, CLASSES)
        self.register_buffer("scale", torch.ones(width))

    def forward(self, x_NT: Tensor) -> Tensor:
        x_NTD = self.embed(x_NT.unsqueeze(-1)) * self.scale
        for layer in self.layers:
            x_NTD = layer(x_NTD)
        logits: Tensor = self.head(x_NTD.mean(dim=1))
        return logits


def make_network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build(MLP, SIGNATURE) if name == "mlp" else Deep()


def batches(rank: int = 0, world_size: int = 1) -> Iterator[loop.Batch]:
    """Global batches of `ROWS` rows; where there are fewer rows than ranks some get none."""
    generator = torch.Generator().manual_seed(1)
    for rows in ROWS:
        inputs = torch.randn(rows, WIDTH, generator=generator)
        targets = torch.randint(0, CLASSES, (rows,), generator=generator)
        mine = share(rows, rank, world_size)
        yield loop.Batch((inputs[mine],), targets[mine], mine.start, rows, weight=rows)


def train_plainly(network: str) -> list[Step]:
    """Every step in one process, nothing applied from outside."""
    model = make_network(network)
    recipe = loop.Recipe(
        lambda step: OPTIMIZER.lr, clip_norm=CLIP_NORM, ask=lambda: ask(loop.ALONE)
    )
    return _follow(model, TASK, model, recipe, loop.ALONE)


def ask(ranks: loop.Ranks) -> tuple[float, float]:
    """What each rank says; in sum 1 and 1."""
    part = (ranks.rank + 1) / sum(range(1, ranks.world_size + 1))
    return part, float(ranks.rank == 0)


def train_case(case: Case, rank: int = 0) -> list[Step]:
    """The same by the strategy of `case`, in micro batches."""
    settings = asdict(case) | {"network": None, "world_size": None}
    spec = TrainSpec(**{key: value for key, value in settings.items() if value is not None})
    model = make_network(case.network)
    parallel = parallelize(model, TASK, spec, CPU, case.world_size)
    ranks = loop.Ranks(rank, case.world_size)
    recipe = loop.Recipe(
        lambda step: OPTIMIZER.lr,
        clip_norm=CLIP_NORM,
        micro_batch=MICRO_BATCH,
        autocast=parallel.autocast,
        scaler=parallel.scaler,
        ask=lambda: ask(ranks),
    )
    return _follow(parallel.model, parallel.task, model, recipe, ranks)


def _follow(
    model: nn.Module, task: Task, bare: nn.Module, recipe: loop.Recipe, ranks: loop.Ranks
) -> list[Step]:
    optimizer = build_optimizer(OPTIMIZER, bare)
    shares = batches(ranks.rank, ranks.world_size)
    steps = loop.fit(model, task, optimizer, shares, recipe, ranks=ranks)
    return [(step.metrics["loss"], step.grad_norm, *step.votes) for step in steps]


def search(room_bytes: int, world_size: int = 1) -> int:
    """The micro batch that is found where `room_bytes` are free."""
    spec = TrainSpec(strategy="fsdp", global_batch=4096)
    model = make_network("deep")
    parallel = parallelize(model, TASK, spec, CPU, world_size)
    optimizer = build_optimizer(OPTIMIZER, model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(room._AVAILABLE, "cpu", lambda device: room_bytes)
        found = fit_micro_batch(parallel, optimizer, SIGNATURE, spec, CPU, world_size=world_size)
    return found.rows


def overflow() -> tuple[float, float]:
    """A gradient that is infinite in the part of rank 0 alone: a weight and the scale after it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model = nn.Linear(4, 4)
    parallel = parallelize(model, TASK, TrainSpec(strategy="fsdp"), CPU, world_size=3)
    optimizer = build_optimizer(OPTIMIZER, model)
    scaler.scale(parallel.model(torch.ones(1, 4)).sum()).backward()
    weight, grad = cast(DTensor, model.weight), cast(DTensor, model.weight.grad)
    before = weight.full_tensor().clone()
    if distributed.get_rank() == 0:
        grad.to_local()[0] = float("inf")
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    moved = weight.full_tensor() - before
    return float(moved.detach().abs().max()), scaler.get_scale()


def train_together(cases: list[Case], directory: Path) -> list[Seen]:
    """What each rank saw: of each case, and of the other collective laws."""
    world_size = max(case.world_size for case in cases)
    spawn(_work, (cases, directory), nprocs=world_size)  # type: ignore[no-untyped-call]
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(world_size)]


def _work(rank: int, cases: list[Case], directory: Path) -> None:
    torch.set_num_threads(1)
    # The same capture of the same graphs without what takes longest, the C++ compiler.
    torch.compile = partial(torch.compile, backend="aot_eager")
    seen: Seen = {}
    for size, group in itertools.groupby(cases, lambda case: case.world_size):
        if rank < size:
            distributed.init_process_group(
                "gloo",
                init_method=f"file://{directory}/group-{size}",
                rank=rank,
                world_size=size,
                timeout=TIMEOUT,
            )
            if size == 3:
                seen["rows"] = search(ROOM_BYTES // (1 + rank), size)
                seen["overflow"] = overflow()
            for case in group:
                seen[str(case)] = train_case(case, rank)
            distributed.destroy_process_group()
    (directory / f"{rank}.json").write_text(json.dumps(seen))
