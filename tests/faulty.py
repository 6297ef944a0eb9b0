"""A network that does something terrible once, at a step of a rank."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from heliostat.signature import Signature


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(10_000)


ACTS: dict[str, Callable[[], None]] = {"kill": kill, "hang": hang, "nothing": lambda: None}


class Faulty(nn.Module):
    """Two layers; the forward pass number `step` of `rank` does `act`, unless it was done before.

    Each pass of rank 0 leaves a line in `journal`, so that a test knows how far the run is.
    """

    def __init__(self, pixels: int, act: str, rank: int, step: int, journal: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 8), nn.Linear(8, 2))
        self.act, self.rank, self.step, self.journal = ACTS[act], rank, step, Path(journal)
        self.passes = 0

    def forward(self, x_N: Tensor) -> Tensor:
        if self.training and x_N.device.type != "meta":
            self.passes += 1
            self._misbehave(distributed.get_rank() if distributed.is_initialized() else 0)
        outputs: Tensor = self.layers(x_N)
        return outputs

    def _misbehave(self, rank: int) -> None:
        if rank == 0:
            with (self.journal / "passes").open("a") as file:
                file.write(f"{self.passes}\n")
        done = self.journal / "done"
        if rank == self.rank and self.passes == self.step and not done.exists():
            done.touch()
            self.act()


def build(signature: Signature, **options: object) -> nn.Module:
    torch.manual_seed(7)
    picture = signature.input
    pixels = picture.channels * picture.height * picture.width  # type: ignore[union-attr]
    return Faulty(pixels, **options)  # type: ignore[arg-type]
