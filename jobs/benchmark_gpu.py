"""How much of this machine's GPU a training step of a GPT uses; the last line is JSON. No Ray.

PYTHONPATH=platform python jobs/benchmark_gpu.py steps=20           # about 0.8 B parameters, bf16
PYTHONPATH=platform python jobs/benchmark_gpu.py micro_batch=8 global_batch=32 steps=30
"""

import json

from heliostat.benchmark import gpu
from heliostat.job import run


def main(*overrides: str) -> None:
    given = {key: int(value) for key, value in (each.split("=", 1) for each in overrides)}
    steps = given.pop("steps", gpu.STEPS)
    train = gpu.TRAIN.model_validate(gpu.TRAIN.model_dump() | given)
    print(json.dumps(gpu.describe(gpu.measure(train=train, steps=steps))))


if __name__ == "__main__":
    run(main)
