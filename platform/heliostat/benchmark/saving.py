"""What a checkpoint holds a training loop up for, beside the same checkpoint waited for.

python -m torch.distributed.run --nproc-per-node=2 -m heliostat.benchmark.saving '{...}'
"""

import json
import statistics
import sys
from itertools import count

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from heliostat import storage
from heliostat.benchmark.plain import build
from heliostat.train.checkpoint import Retention
from heliostat.train.state import State
from heliostat.train.writer import Writer

CLASSES, STEPS_BETWEEN = 10, 20


def main(root: str, run: str, widths: list[int], batch: int, saves: int, threads: int) -> None:
    """Train on noise and save in turn in the background and waiting; rank 0 prints the medians.

    `saves` of each kind, after one that makes the plan and the buffers. Seconds.
    """
    torch.set_num_threads(threads)
    distributed.init_process_group("gloo")
    torch.manual_seed(distributed.get_rank())
    model = DistributedDataParallel(build([*widths, CLASSES]), gradient_as_bucket_view=True)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    inputs = torch.randn(batch, widths[0])
    labels = torch.randint(CLASSES, (batch,))
    writer = Writer(storage.connect(root), run, Retention(keep=1))
    state = State(model, optimizer)
    numbers = count()

    def train() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        torch.autograd.backward(loss)
        optimizer.step()

    def save() -> float:
        train()
        return writer.begin(next(numbers), state, {})

    save()
    writer.finish()
    stalls, waits = [], []
    for _ in range(saves):
        stalls.append(save())
        for _ in range(STEPS_BETWEEN):
            train()
        writer.finish()
        waits.append(save() + writer.finish())
    if distributed.get_rank() == 0:
        size = writer.saved.written_bytes if writer.saved else 0
        print(json.dumps([statistics.median(stalls), statistics.median(waits), size]))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
