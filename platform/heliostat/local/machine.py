"""What this machine offers: cores, memory and free ports."""

import random
import socket
from collections.abc import Iterable
from pathlib import Path

import psutil

from heliostat.environment import (
    PREFERRED_PORTS,
    REPLICA_PORTS,
    STORE_PORT_OFFSET,
    MachineBounds,
    bound_machine,
)
from heliostat.errors import HeliostatError

COMPANIONS = {port + STORE_PORT_OFFSET for port in PREFERRED_PORTS.values()}
PICKED_PORTS = [port for port in range(12_000, 20_000) if port not in COMPANIONS]
REPLICA_RANGES = range(30_000, 32_700, REPLICA_PORTS)
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def measure() -> MachineBounds:
    """The bounds of a Ray node here; a container's memory limit counts as its memory."""
    limits = [_read_bytes(Path(path)) for path in MEMORY_LIMITS]
    return bound_machine(
        cores=psutil.cpu_count() or 1,
        memory_bytes=min([psutil.virtual_memory().total, *filter(None, limits)]),
    )


def is_free(port: int) -> bool:
    """Whether nobody listens on `port`, on loopback or on all interfaces."""
    return all(_can_bind(host, port) for host in ("127.0.0.1", ""))


def pick_ports(count: int) -> list[int]:
    """`count` free ports whose neighbours 10,000 above are free as well."""
    free = (
        port
        for port in random.sample(PICKED_PORTS, len(PICKED_PORTS))
        if is_free(port) and is_free(port + STORE_PORT_OFFSET)
    )
    return [next(free) for _ in range(count)]


def pick_replica_ports() -> int:
    """The first of a range of free ports for the HTTP servers inside Serve replicas."""
    starts = random.sample(REPLICA_RANGES, len(REPLICA_RANGES))
    return next(start for start in starts if all(map(is_free, range(start, start + 8))))


def check_free(wanted: Iterable[tuple[str, int]]) -> None:
    """Refuse ports that another program listens on.

    Raises:
        HeliostatError: names each taken port and what it was wanted for.
    """
    taken = [f"{port} ({purpose})" for purpose, port in wanted if not is_free(port)]
    if taken:
        raise HeliostatError(
            f"another program listens on port {' and '.join(taken)}: stop that program, or let "
            f"`heliostat up --free-ports` choose other ports"
        )


def _read_bytes(path: Path) -> int | None:
    """The number in a cgroup file; None where there is no such file or no limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _can_bind(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
