"""The room that a node has left: on its disks, in shared memory, in memory, for open files."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from heliostat.cluster.preflight.finding import Finding, Level

GIB = 2**30
# Ray makes no objects on a disk that is fuller, and ends tasks of a node whose memory is.
FULL_SHARE = 0.95
FEW_FILES, ENOUGH_FILES = 4096, 16384


@dataclass(frozen=True)
class Disk:
    """What lies below `path` in bytes, and what it is for."""

    purpose: str
    path: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Room:
    """Of one node. `store_bytes` is what Ray may hold in objects, in shared memory if
    `store_path` is /dev/shm; `open_files` is the limit of its raylet."""

    disks: tuple[Disk, ...]
    shared_bytes: int
    store_bytes: int
    store_path: str
    memory_bytes: int
    memory_free_bytes: int
    open_files: int


def judge_room(rooms: Mapping[str, Room], disk_gib: float, memory_gib: float) -> list[Finding]:
    """At least so much must be free on each disk and in memory."""
    findings = []
    for node, room in rooms.items():
        found = [*_judge(node, room, disk_gib, memory_gib)]
        findings += found or [Finding(node, "room", "ok", _describe(room))]
    return findings


def _judge(node: str, room: Room, disk_gib: float, memory_gib: float) -> Iterator[Finding]:
    for disk in room.disks:
        if _is_full(disk.free_bytes, disk.total_bytes, disk_gib):
            advice = f"free space below {disk.path}, or start Ray with a --temp-dir on another disk"
            measured = f"{_share(disk.free_bytes, disk.total_bytes)} free in {disk.path}"
            yield Finding(node, f"disk for {disk.purpose}", "failed", measured, advice)
    if _is_full(room.memory_free_bytes, room.memory_bytes, memory_gib):
        measured = f"{_share(room.memory_free_bytes, room.memory_bytes)} free"
        advice = "end what takes the memory of this node: Ray ends tasks of a node that is full"
        yield Finding(node, "memory", "failed", measured, advice)
    if room.store_path != "/dev/shm":
        advice = "give the node more shared memory (`--shm-size` of a container): a disk is slower"
        yield Finding(node, "object store", "warning", f"lies in {room.store_path}", advice)
    elif room.shared_bytes < room.store_bytes:
        measured = f"{_gib(room.store_bytes)} of objects, /dev/shm has {_gib(room.shared_bytes)}"
        advice = "enlarge /dev/shm (`--shm-size` of a container) or lower --object-store-memory"
        yield Finding(node, "object store", "failed", measured, advice)
    if room.open_files < ENOUGH_FILES:
        level: Level = "failed" if room.open_files < FEW_FILES else "warning"
        advice = "`ulimit -n 65536` before `ray start`: each worker and connection takes some"
        yield Finding(node, "open files", level, f"{room.open_files:,} at most", advice)


def _is_full(free_bytes: int, total_bytes: int, least_gib: float) -> bool:
    return free_bytes < max(least_gib * GIB, (1 - FULL_SHARE) * total_bytes)


def _describe(room: Room) -> str:
    disks = {disk.path: disk for disk in room.disks}.values()
    shown = [f"{_share(disk.free_bytes, disk.total_bytes)} free in {disk.path}" for disk in disks]
    return (
        f"{', '.join(shown)}; {_share(room.memory_free_bytes, room.memory_bytes)} of memory free; "
        f"{_gib(room.store_bytes)} for objects in {_gib(room.shared_bytes)}; "
        f"{room.open_files:,} open files"
    )


def _share(part_bytes: int, whole_bytes: int) -> str:
    return f"{part_bytes / GIB:,.1f} of {_gib(whole_bytes)}"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:,.1f} GiB"
