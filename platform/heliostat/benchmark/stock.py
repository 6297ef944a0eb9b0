"""The peer of a run: Ray Train and Ray Data as their guides say, nothing of the platform in it.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- \
    python -m heliostat.benchmark.stock '{...}'
"""

import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import ray
import ray.data
import ray.train
import ray.train.torch
import torch
from torch import nn

from heliostat.benchmark.plain import build


@dataclass(frozen=True)
class Task:
    """What is trained on what; `folder` is the URI of all that the run writes.

    Rows are bytes in the column `image` and an index in the column `label` of the Parquet `files`.
    """

    files: list[str]
    folder: str
    run: str
    widths: list[int]
    lr: float
    batch: int
    steps: int
    checkpoint_steps: int
    workers: int
    max_failures: int


def main(task: Task) -> None:
    system, folder = pyarrow.fs.FileSystem.from_uri(task.folder)
    rows = ray.data.read_parquet(task.files, filesystem=system, columns=["image", "label"])
    trainer = ray.train.torch.TorchTrainer(
        train,
        train_loop_config=asdict(task),
        scaling_config=ray.train.ScalingConfig(num_workers=task.workers),
        run_config=ray.train.RunConfig(
            name=task.run,
            storage_path=folder,
            storage_filesystem=system,
            failure_config=ray.train.FailureConfig(max_failures=task.max_failures),
        ),
        datasets={"train": rows.map_batches(decode)},
    )
    trainer.fit()


def decode(batch: dict[str, Any]) -> dict[str, Any]:
    pixels = np.frombuffer(b"".join(batch["image"]), np.uint8).reshape(len(batch["label"]), -1)
    inputs = (pixels.astype(np.float32) / 255 - 0.5) / 0.25
    return {"inputs": inputs, "label": batch["label"].astype(np.int64)}


def train(config: dict[str, Any]) -> None:
    task = Task(**config)
    rank = ray.train.get_context().get_world_rank()
    network = build(task.widths)
    model = ray.train.torch.prepare_model(network)
    optimizer = torch.optim.Adam(model.parameters(), task.lr)
    step = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as directory:
            state = torch.load(Path(directory, "state.pt"))
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    rows = ray.train.get_dataset_shard("train")
    ends: list[float] = []
    while step < task.steps:
        for batch in rows.iter_torch_batches(batch_size=task.batch // task.workers, drop_last=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch["inputs"]), batch["label"])
            torch.autograd.backward(loss)
            optimizer.step()
            step += 1
            ends.append(time.time())
            if step % task.checkpoint_steps == 0 or step == task.steps:
                save(step, loss.item(), network, optimizer, rank)
            if rank == 0 and (len(ends) == 1 or step % task.checkpoint_steps == 0):
                record(task, ends)
            if step == task.steps:
                break


def save(
    step: int, loss: float, network: nn.Module, optimizer: torch.optim.Optimizer, rank: int
) -> None:
    if rank != 0:
        ray.train.report({"step": step, "loss": loss})
        return
    state = {"step": step, "model": network.state_dict(), "optimizer": optimizer.state_dict()}
    with tempfile.TemporaryDirectory() as directory:
        torch.save(state, Path(directory, "state.pt"))
        checkpoint = ray.train.Checkpoint.from_directory(directory)
        ray.train.report({"step": step, "loss": loss}, checkpoint=checkpoint)


def record(task: Task, ends: list[float]) -> None:
    """When each step of this attempt ended, Unix time: what the benchmark reads."""
    system, folder = pyarrow.fs.FileSystem.from_uri(task.folder)
    system.create_dir(f"{folder}/{task.run}-steps")
    with system.open_output_stream(f"{folder}/{task.run}-steps/{ends[0]:017.6f}.json") as stream:
        stream.write(json.dumps(ends).encode())


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
