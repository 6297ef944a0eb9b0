"""How much of this machine's GPU a training step of a GPT uses; the last line is JSON. No Ray.

PYTHONPATH=platform python jobs/benchmark_gpu.py steps=20           # about 0.8 B parameters, bf16
PYTHONPATH=platform python jobs/benchmark_gpu.py micro_batch=8 global_batch=32 steps=30
"""

import json
from typing import Literal

from heliostat.benchmark import gpu
from heliostat.job import run
from heliostat.spec import Positive, Section, parse_options


class Options(Section):
    steps: Positive = gpu.STEPS
    micro_batch: Positive | Literal["auto"] | None = gpu.TRAIN.micro_batch
    global_batch: Positive = gpu.TRAIN.global_batch


def main(*overrides: str) -> None:
    options = parse_options(Options, overrides)
    train = gpu.TRAIN.model_copy(
        update={"micro_batch": options.micro_batch, "global_batch": options.global_batch}
    )
    print(json.dumps(gpu.describe(gpu.measure(train=train, steps=options.steps))))


if __name__ == "__main__":
    run(main)
