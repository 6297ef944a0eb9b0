"""`heliostat watch-spot` as a process of its own, and the nodes that Ray drains."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray


class Agent:
    """A watch that runs; `lines` are what it has said so far, without their times."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process, self._log = process, log

    @property
    def lines(self) -> list[str]:
        return [line.partition(" ")[2] for line in self._log.read_text().splitlines()]

    def count(self, begins: str) -> int:
        return sum(line.startswith(begins) for line in self.lines)


@contextmanager
def run_watch(folder: Path, *options: str, **environment: str) -> Iterator[Agent]:
    """A watch with `options` and a claim and a log in `folder`, ended with the block."""
    log = folder / f"watch-{len(list(folder.iterdir()))}.log"
    command = [sys.executable, "-P", "-m", "heliostat.cli", "watch-spot", *options]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--claim", str(folder / "claim")],
            env={**os.environ, **environment},
            stdout=output,
            stderr=output,
        )
    try:
        yield Agent(process, log)
    finally:
        process.terminate()
        try:
            process.wait(10)
        finally:
            process.kill()


def list_draining() -> dict[str, int]:
    """The ids of nodes that drain, with the deadline of each in milliseconds since 1970."""
    found: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return found
