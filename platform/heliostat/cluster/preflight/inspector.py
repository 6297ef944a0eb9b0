"""Who looks around on a node: what it runs, what guards it, what room and which rates it has."""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil
import ray
import ray.util
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory

from heliostat import storage
from heliostat.cluster.preflight import links, sockets
from heliostat.cluster.preflight.bucket import Rate, measure_bucket
from heliostat.cluster.preflight.gpu import Gpu, read_gpus
from heliostat.cluster.preflight.guard import Guard, read_guard
from heliostat.cluster.preflight.links import Speed
from heliostat.cluster.preflight.room import Disk, Room
from heliostat.cluster.preflight.sockets import Listener
from heliostat.cluster.preflight.versions import Versions, read_versions
from heliostat.environment import STAND_IN

GLOO, NCCL = "gloo", "nccl"


@dataclass(frozen=True)
class Account:
    """What a node says of itself."""

    versions: Versions
    guard: Guard
    listeners: tuple[Listener, ...]
    room: Room
    gpus: tuple[Gpu, ...]
    gpu_error: str
    stands_in: bool


class Inspector:
    """An actor on one node. It asks for no resources, so that a busy node answers too."""

    def __init__(self) -> None:
        # Ray hides the GPUs of a node from those who did not ask for one.
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        self._meeting: Any = None

    def describe(self, is_head: bool, store_bytes: int) -> Account:
        """`store_bytes` is what the node's object store may hold."""
        raylet = _find_raylet()
        environment = raylet.environ()
        given = ray.get_runtime_context().runtime_env.get("env_vars") or {}
        gpus, error = read_gpus()
        return Account(
            read_versions(),
            read_guard(environment, given),
            sockets.list_listeners(_list_processes(raylet, is_head)),
            _read_room(raylet, environment, store_bytes),
            gpus,
            error,
            STAND_IN in environment,
        )

    def tell_time(self) -> float:
        """Seconds since 1970 by the clock of this node."""
        return time.time()

    def try_bucket(self, uri: str) -> Rate:
        return measure_bucket(storage.connect(uri))

    def open_meeting(self, ranks: int) -> tuple[str, int]:
        """Where `ranks` inspectors, this one the first of them, can meet."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        host = ray.util.get_node_ip_address()
        self._meeting = TCPStore(host, 0, ranks, True, wait_for_workers=False)
        return host, self._meeting.port

    def exchange(
        self, backend: str, meeting: tuple[str, int], rank: int, ranks: int, seconds: float
    ) -> Speed:
        """Measure the links of a group, which gives up after `seconds` without an answer."""
        own, self._meeting = (self._meeting if rank == 0 else None), None
        return links.join_group(backend, meeting, rank, ranks, seconds, own)


def _find_raylet() -> psutil.Process:
    """Of this worker's node; its environment is that which the node was started with."""
    return next(one for one in psutil.Process().parents() if one.name() == "raylet")


def _list_processes(raylet: psutil.Process, is_head: bool) -> list[psutil.Process]:
    """Those of this node, and on the head those of the session that no raylet started."""
    found = [raylet, *raylet.children(recursive=True)]
    if is_head:
        found += _list_head_processes()
    return found


def _list_head_processes() -> Iterator[psutil.Process]:
    """Those that name the session and have no raylet above them: GCS, dashboard and the like."""
    session = ray._private.worker._global_node.session_name
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            of_session = session in " ".join(process.cmdline())
            if of_session and "raylet" not in _name_line(process):
                yield from (process, *process.children(recursive=True))


def _name_line(process: psutil.Process) -> set[str]:
    """The names of a process and of all above it."""
    return {one.name() for one in (process, *process.parents())}


def _read_room(raylet: psutil.Process, environment: dict[str, str], store_bytes: int) -> Room:
    node = ray._private.worker._global_node
    session = node.get_session_dir_path()
    spilled = environment.get("RAY_object_spilling_directory") or session
    disks = [_read_disk("sessions and logs", session), _read_disk("spilled objects", spilled)]
    memory_bytes = get_system_memory()
    options = dict(word.split("=", 1) for word in raylet.cmdline() if "=" in word)
    return Room(
        tuple(disks[:1] if spilled == session else disks),
        psutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        store_bytes,
        options.get("--plasma_directory", "/dev/shm"),
        memory_bytes,
        max(0, memory_bytes - get_used_memory()),
        raylet.rlimit(psutil.RLIMIT_NOFILE)[0],
    )


def _read_disk(purpose: str, path: str) -> Disk:
    usage = psutil.disk_usage(path)
    return Disk(purpose, path, usage.total, usage.free)
