"""Servers that a benchmark starts beside each other, each a process of its own."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from heliostat.errors import HeliostatError

START_SECONDS = 420.0
STOP_SECONDS = 30.0
MAX_LOG_CHARS = 600


@contextmanager
def run_server(
    command: Sequence[str], url: str, log: Path, settings: Mapping[str, str] | None = None
) -> Iterator[int]:
    """A server from the moment that `url` answers 200 to the end of the block; its process group.

    Raises:
        HeliostatError: it ends, or does not answer in time; the sentence has its last lines.
    """
    environment = {**os.environ, **(settings or {})}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=sink, env=environment, start_new_session=True
        )
    try:
        if not _await_answer(url, process):
            last = " ".join(log.read_text(errors="replace").split())[-MAX_LOG_CHARS:]
            raise HeliostatError(f"{' '.join(command[:3])} does not answer: {last}")
        yield process.pid
    finally:
        end(process)


@contextmanager
def pause(groups: Iterable[int]) -> Iterator[None]:
    """Within, these servers stand still: what they do while nobody asks them takes no core."""
    with ExitStack() as stack:
        for group in groups:
            os.killpg(group, signal.SIGSTOP)
            stack.callback(os.killpg, group, signal.SIGCONT)
        yield


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a server that leads its session, and whatever it started and left behind."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def find_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def _await_answer(url: str, process: "subprocess.Popen[bytes]") -> bool:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5.0) as response:
                if response.status == 200:
                    return True
        except OSError:
            time.sleep(0.05)
    return False
