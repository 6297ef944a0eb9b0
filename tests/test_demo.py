"""The demo as a user runs it: the whole line works, and nothing of it stays, interrupted or not."""

import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from heliostat.local.home import Home, read_state

CHECKOUT = Path(__file__).parents[1]
FOREIGN = ("RAY_", "AWS_")
MARKER = "HELIOSTAT_DEMO_TEST"
DEADLINE_SECONDS = 420
HOME = re.compile(r"^Starting .* in (\S+)$", re.MULTILINE)
PASSED = re.compile(
    r"demo ok: test accuracy (\d\.\d+), "
    r"100/100 HTTP answers equal the offline predictions, \d+ s"
)


@dataclass(frozen=True)
class Demo:
    """A running demo, whose processes carry `token` in their environment."""

    process: "subprocess.Popen[str]"
    token: str

    def follow(self, see: Callable[[str], object]) -> tuple[list[str], list[Path]]:
        """Show every line to `see` until the end: the lines, and the demo's own directories."""
        assert self.process.stdout is not None
        lines: list[str] = []
        directories: list[Path] = []
        for line in map(str.rstrip, self.process.stdout):
            lines.append(line)
            if "python jobs/prepare.py" in line:
                directories = _find_directories(lines)
            see(line)
        self.process.wait()
        return lines, directories

    def list_processes(self, directories: list[Path]) -> list[psutil.Process]:
        """What carries the token in its environment or one of `directories` in its command line."""
        return [
            process
            for process in psutil.process_iter()
            if self._owns(process) or any(str(path) in _tell(process) for path in directories)
        ]

    def _owns(self, process: psutil.Process) -> bool:
        try:
            return bool(process.environ().get(MARKER) == self.token)
        except (psutil.Error, OSError):
            return False


@pytest.fixture
def demo() -> Iterator[Demo]:
    """`python jobs/demo.py` in an environment that knows of no cluster; it ends with the test."""
    token = secrets.token_hex(8)
    own = {name: text for name, text in os.environ.items() if not name.startswith(FOREIGN)}
    with subprocess.Popen(
        [sys.executable, "jobs/demo.py"],
        cwd=CHECKOUT,
        env={**own, MARKER: token},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        deadline = threading.Timer(DEADLINE_SECONDS, process.terminate)
        deadline.start()
        yield Demo(process, token)
        deadline.cancel()
        process.terminate()
        process.communicate()
    for leftover in Demo(process, token).list_processes([]):
        leftover.kill()


@pytest.mark.cluster
def test_the_demo_answers_as_predicted_and_leaves_nothing(demo: Demo) -> None:
    most = 0

    def count(line: str) -> None:
        nonlocal most
        if "python jobs/evaluate.py" in line:
            most = len(demo.list_processes([]))

    lines, directories = demo.follow(count)
    told = "\n".join(lines)
    assert demo.process.returncode == 0, told
    passed = PASSED.fullmatch(lines[-1])
    assert passed is not None, told
    assert float(passed[1]) >= 0.95
    assert most > 10
    assert demo.list_processes(directories) == []
    assert [directory for directory in directories if directory.exists()] == []


@pytest.mark.cluster
@pytest.mark.faults
def test_an_interrupted_demo_leaves_nothing(demo: Demo) -> None:
    stage = ""

    def interrupt(line: str) -> None:
        nonlocal stage
        if "python jobs/" in line:
            stage = line
        if "python jobs/train.py" in stage and line.startswith("run digits-"):
            demo.process.send_signal(signal.SIGINT)

    lines, directories = demo.follow(interrupt)
    told = "\n".join(lines)
    assert "python jobs/train.py" in stage, told
    assert directories, told
    assert demo.process.returncode != 0, told
    assert "interrupted" in lines[-1], told
    assert demo.list_processes(directories) == []
    assert [directory for directory in directories if directory.exists()] == []


def _find_directories(lines: list[str]) -> list[Path]:
    """The home that a running demo has told, and the scratch directory of its cluster."""
    told = HOME.search("\n".join(lines))
    assert told is not None
    home = Home(Path(told[1]))
    state = read_state(home)
    assert state is not None
    directories = [home.path.parent, state.scratch]
    assert all(directory.is_dir() for directory in directories)
    return directories


def _tell(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.Error, OSError):
        return ""
