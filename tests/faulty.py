"""A network that does something terrible once, at a step of a rank."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensor

from heliostat.signature import Signature


def kill(journal: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(journal: Path) -> None:
    time.sleep(10_000)


def pause(journal: Path) -> None:
    """Until a test makes the file `go`."""
    while not (journal / "go").exists():
        time.sleep(0.05)


def exhaust(journal: Path) -> None:
    """Ask for more memory than there is, in every life of the run."""
    (journal / "done").unlink()
    torch.empty(2**55)


ACTS: dict[str, Callable[[Path], None]] = {
    "kill": kill,
    "hang": hang,
    "pause": pause,
    "exhaust": exhaust,
    "nothing": lambda journal: None,
}


class Faulty(nn.Module):
    """Two layers; the forward pass number `step` of `rank` does `act`, unless it was done before.

    Each pass of rank 0 leaves a line in `journal`, its number and that of the ranks, so that a test
    knows how far the run is.
    """

    def __init__(self, pixels: int, act: str, rank: int, step: int, journal: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 8), nn.Linear(8, 2))
        self.act, self.rank, self.step, self.journal = ACTS[act], rank, step, Path(journal)
        self.passes = 0

    def forward(self, x_N: Tensor) -> Tensor:
        # A plan runs it on tensors without values: those passes are none.
        if self.training and x_N.device.type != "meta" and not isinstance(x_N, FakeTensor):
            self.passes += 1
            self._misbehave(distributed.get_rank() if distributed.is_initialized() else 0)
        outputs: Tensor = self.layers(x_N)
        return outputs

    def _misbehave(self, rank: int) -> None:
        if rank == 0:
            with (self.journal / "passes").open("a") as file:
                ranks = distributed.get_world_size() if distributed.is_initialized() else 1
                file.write(f"{self.passes} {ranks}\n")
        done = self.journal / "done"
        if rank == self.rank and self.passes == self.step and not done.exists():
            done.touch()
            self.act(self.journal)


def build(signature: Signature, **options: object) -> nn.Module:
    torch.manual_seed(7)
    picture = signature.input
    pixels = picture.channels * picture.height * picture.width  # type: ignore[union-attr]
    return Faulty(pixels, **options)  # type: ignore[arg-type]
