"""Starting processes that carry a marker, and finding and ending exactly these."""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import psutil

from heliostat.errors import HeliostatError

MARKER = "HELIOSTAT_INSTANCE"
FOREIGN = ("AWS_", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_", "RAY_JOB_CONFIG")
POLL_SECONDS = 0.05
KILL_SECONDS = 10.0


def launch(
    marker: str,
    arguments: list[str],
    environment: Mapping[str, str],
    log: Path,
    stdin: int = subprocess.DEVNULL,
) -> "subprocess.Popen[bytes]":
    """Run a command in a session of its own, where neither Ctrl-C nor a closed terminal reaches it.

    `environment` is the whole of it, apart from the `marker` that all descendants inherit.
    """
    with log.open("wb") as output:
        return subprocess.Popen(
            arguments,
            env={**environment, MARKER: marker},
            stdin=stdin,
            stdout=output,
            stderr=output,
            cwd=log.parent,
            start_new_session=True,
        )


def clean_environment() -> dict[str, str]:
    """This process's environment without credentials and addresses of other clusters."""
    return {name: text for name, text in os.environ.items() if not name.startswith(FOREIGN)}


def find(marker: str, more: Mapping[str, str] = MappingProxyType({})) -> list[psutil.Process]:
    """The living processes that carry `marker` in their environment, and their descendants.

    With `more`, those of them whose environment has that as well.

    A marker is random and inherited, so a recycled process id can never be taken for one of ours.
    `info["name"]` of a process is its name as it was then; to ask for it later may fail.
    """
    living = [process for process in psutil.process_iter(["name", "ppid"]) if _is_alive(process)]
    carried = {MARKER: marker, **more}.items()
    ours = {process.pid for process in living if carried <= read_environment(process).items()}
    while grown := {process.pid for process in living if process.info["ppid"] in ours} - ours:
        ours |= grown
    return [process for process in living if process.pid in ours - {os.getpid()}]


def end(
    marker: str, grace_seconds: float, more: Mapping[str, str] = MappingProxyType({})
) -> list[int]:
    """SIGTERM, after `grace_seconds` SIGKILL, until nothing that `find` finds is left; their ids.

    Raises:
        HeliostatError: a process outlives SIGKILL, as one that waits for a broken disk does.
    """
    ended: set[int] = set()
    kill_at = time.monotonic() + grace_seconds
    while processes := find(marker, more):
        overdue_seconds = time.monotonic() - kill_at
        if overdue_seconds > KILL_SECONDS:
            pids = ", ".join(str(process.pid) for process in processes)
            raise HeliostatError(f"processes {pids} do not end, not even by SIGKILL: reboot")
        for process in processes:
            if overdue_seconds > 0:
                _signal(process.kill)
            elif process.pid not in ended:
                _signal(process.terminate)
        ended |= {process.pid for process in processes}
        time.sleep(POLL_SECONDS)
    return sorted(ended)


def wait_for(is_ready: Callable[[], bool], timeout_seconds: float) -> bool:
    """Poll `is_ready` until it holds or `timeout_seconds` have passed; whether it held."""
    deadline = time.monotonic() + timeout_seconds
    while not (ready := is_ready()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return ready


def measure_memory(process: psutil.Process) -> int:
    """The resident bytes of `process` that it shares with nobody; 0 if it has just ended."""
    try:
        memory = process.memory_info()
    except psutil.Error:
        return 0
    return int(memory.rss - getattr(memory, "shared", 0))


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def read_environment(process: psutil.Process) -> dict[str, str]:
    """What it was started with; nothing if it has just ended or is somebody else's."""
    try:
        environment: dict[str, str] = process.environ()
    except (psutil.Error, OSError):
        return {}
    return environment


def _signal(send: Callable[[], None]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        send()
