"""The peer of a training step: PyTorch's own data parallel loop, its tensors in memory.

python -m torch.distributed.run --standalone --nproc-per-node=2 -m heliostat.benchmark.plain '{...}'
"""

import json
import sys
import time
from itertools import pairwise

import numpy as np
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


def main(data: str, hidden: list[int], lr: float, batch: int, steps: int, threads: int) -> None:
    """Train on the arrays in the file `data`; rank 0 prints when each step ended, Unix time."""
    torch.set_num_threads(threads)
    distributed.init_process_group("gloo")
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    arrays = np.load(data)
    inputs = torch.from_numpy(arrays["inputs"])[rank::world_size]
    labels = torch.from_numpy(arrays["labels"])[rank::world_size]
    torch.manual_seed(0)
    widths = [inputs.shape[1], *hidden, int(arrays["labels"].max()) + 1]
    model = DistributedDataParallel(build(widths), gradient_as_bucket_view=True)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    rows = batch // world_size
    ends = []
    for step in range(steps):
        first = step * rows % (len(inputs) - rows + 1)
        optimizer.zero_grad()
        outputs = model(inputs[first : first + rows])
        loss = nn.functional.cross_entropy(outputs, labels[first : first + rows])
        torch.autograd.backward(loss)
        optimizer.step()
        ends.append(time.time())
    if rank == 0:
        print(json.dumps(ends))
    distributed.destroy_process_group()


def build(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths[:-1]):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
