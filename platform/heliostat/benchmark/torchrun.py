"""Modules of the benchmark under PyTorch's own launcher, in processes of one machine."""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from heliostat.errors import HeliostatError


class Torchrun:
    """A module under torchrun, and what it prints."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path, errors: Path) -> None:
        self.pid, self.poll = process.pid, process.poll
        self._process, self._log, self._errors = process, log, errors

    def wait(self) -> Any:
        """What it prints as JSON in its last line.

        Raises:
            HeliostatError: it failed; has its last lines.
        """
        if self._process.wait():
            errors = self._errors.read_text(errors="replace")
            raise HeliostatError(f"torchrun failed: {errors[-2000:]}")
        return json.loads(self._log.read_text().splitlines()[-1])


@contextlib.contextmanager
def start_torchrun(module: str, processes: int, options: dict[str, Any]) -> Iterator[Torchrun]:
    """`module` in so many processes; they are gone in the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", "-m", module, json.dumps(options)]
    with tempfile.TemporaryDirectory() as directory:
        log, errors = Path(directory, "log"), Path(directory, "errors")
        with (
            log.open("wb") as stdout,
            errors.open("wb") as stderr,
            subprocess.Popen(command, stdout=stdout, stderr=stderr) as process,
        ):
            try:
                yield Torchrun(process, log, errors)
            finally:
                process.terminate()
