"""How fast nodes exchange tensors: each pair and all of them, by what PyTorch trains with."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from statistics import median_high
from typing import TYPE_CHECKING, Any

from heliostat.cluster.preflight.finding import CLUSTER, Finding, shorten
from heliostat.cluster.preflight.rounds import Pair
from heliostat.hardware import MACHINES
from heliostat.plan.fleet import LOOPBACK
from heliostat.plan.step import RING_SHARE

if TYPE_CHECKING:
    import torch

GB = 10**9
# The bytes of a tensor that one rank holds, and how often it is exchanged. Over 1 Gbit/s a pair
# takes two seconds with them.
TENSOR_BYTES = {"gloo": 8 * 2**20, "nccl": 256 * 2**20}
TIMES = 4
PINGS = 20


@dataclass(frozen=True)
class Speed:
    """Bytes/s of the bus by all-reduce, all-gather and, of a pair, from one to the other (0.0
    else); the seconds in which four bytes are all-reduced."""

    reduce: float
    gather: float
    send: float
    latency_seconds: float


@dataclass(frozen=True)
class Fabric:
    """What was measured over `backend`: pairs, and all at once; None where nothing came back.

    `all_pairs` says how many there are, of which the measured ones may be a part, and `place` what
    lies between the nodes: "loopback", the name of a machine in the table, or nothing known.
    """

    backend: str
    pairs: Mapping[Pair, Speed | None]
    whole: Speed | None
    nodes: int
    all_pairs: int
    place: str = ""


def bus_rate(operation: str, size_bytes: float, seconds: float, ranks: int) -> float:
    """Bytes/s through the busiest link: size / time x a factor by operation, as nccl-tests
    reports it (doc/PERFORMANCE.md, "Bus bandwidth"). The size of a gather is that of its result."""
    factor = {"reduce": 2 * (ranks - 1) / ranks, "gather": (ranks - 1) / ranks, "send": 1.0}
    return size_bytes / seconds * factor[operation]


def measure_speed(backend: str, rank: int, ranks: int, device: "torch.device") -> Speed:
    """Within a process group of `ranks`; each rank must call it."""
    import torch
    from torch import distributed

    size_bytes = TENSOR_BYTES[backend]
    # All that is gathered stays as large as what one rank holds, however many there are.
    tensor = torch.ones(size_bytes // 4, device=device)
    part = torch.ones(size_bytes // 4 // ranks, device=device)
    parts = [torch.empty_like(part) for _ in range(ranks)]
    ping = torch.ones(1, device=device)

    def take(act: Callable[[], object], times: int) -> float:
        act()  # connections are made by the first
        distributed.barrier()
        _await(device)
        began = time.monotonic()
        for _ in range(times):
            act()
        _await(device)
        return (time.monotonic() - began) / times

    reduce = take(lambda: distributed.all_reduce(tensor), TIMES)
    gather = take(lambda: distributed.all_gather(parts, part), TIMES)
    latency = take(lambda: distributed.all_reduce(ping), PINGS)
    send = take(lambda: _send(tensor, rank), TIMES) / 2 if ranks == 2 else 0.0
    return Speed(
        bus_rate("reduce", size_bytes, reduce, ranks),
        bus_rate("gather", part.nbytes * ranks, gather, ranks),
        bus_rate("send", size_bytes, send, ranks) if send else 0.0,
        latency,
    )


def join_group(
    backend: str, meeting: tuple[str, int], rank: int, ranks: int, seconds: float, own: Any
) -> Speed:
    """Meet the others at `meeting`, measure, and leave; `own` is the store of rank 0, kept open."""
    import torch
    from torch import distributed
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    patience = timedelta(seconds=seconds)
    store = own or TCPStore(*meeting, ranks, False, patience)
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=ranks, timeout=patience
    )
    try:
        return measure_speed(backend, rank, ranks, device)
    finally:
        distributed.destroy_process_group()


def find_slow_nodes(rates: Mapping[Pair, float], slow_share: float) -> set[str]:
    """The nodes whose fastest pair is much slower than the fastest pair of most nodes.

    A slow node slows all its pairs and each of its partners only once: they stay fast elsewhere.
    Of two nodes alone none can be told from the other.
    """
    best = _find_best(rates)
    usual = _find_usual(best)
    return {node for node, rate in best.items() if rate < slow_share * usual}


def judge_fabric(fabric: Fabric, slow_share: float) -> list[Finding]:
    """Slow nodes, then slow pairs of other nodes, then all of them against what a plan expects."""
    check = f"network, {fabric.backend}"
    rates = {pair: _worst(speed) for pair, speed in fabric.pairs.items()}
    best = _find_best(rates)
    usual = _find_usual(best)
    slow = find_slow_nodes(rates, slow_share)
    findings = []
    for node in sorted(slow):
        measured = f"no pair with it exceeds {_gb(best[node])}, of most nodes one has {_gb(usual)}"
        advice = "keep it out of training and look at its network card and cable"
        findings.append(Finding(node, check, "failed", measured, advice))
    for pair, rate in rates.items():
        if not slow.intersection(pair) and (rate == 0 or rate < slow_share * usual):
            findings += _blame_pair(check, pair, rate, usual)
    return [*findings, *_judge_whole(check, fabric)]


def _blame_pair(check: str, pair: Pair, rate: float, usual: float) -> list[Finding]:
    """Both ends: neither is slow elsewhere, or there is nobody else to tell by."""
    reached = f"{_gb(rate)}, most nodes have one of {_gb(usual)}" if rate else "no answer in time"
    advice = "keep one of the two out of training and look at what lies between them"
    return [
        Finding(node, check, "failed", f"with {shorten(other)}: {reached}", advice)
        for node, other in (pair, pair[::-1])
    ]


def _judge_whole(check: str, fabric: Fabric) -> list[Finding]:
    if fabric.whole is None:
        if fabric.nodes < 2:
            return []
        advice = "see what else failed: with a node that does not answer nobody gets through"
        return [Finding(CLUSTER, check, "failed", "all together: no answer in time", advice)]
    measured = (
        f"all {fabric.nodes} together: {_describe(fabric.whole)}; {len(fabric.pairs)} of "
        f"{fabric.all_pairs} pairs measured"
    )
    expected = _expect(fabric.place)
    if expected and fabric.whole.reduce < expected / 2:
        advice = (
            f"a plan counts on {_gb(expected)} here: steps whose exchange is not hidden take "
            "longer than planned"
        )
        return [Finding(CLUSTER, check, "warning", measured, advice)]
    return [Finding(CLUSTER, check, "ok", measured)]


def _expect(place: str) -> float:
    """Bytes/s of a ring that plans count on; 0 where nothing is known of what lies between."""
    network = {machine.name: machine.network for machine in MACHINES} | {"loopback": LOOPBACK}
    return RING_SHARE * network.get(place, 0.0)


def _describe(speed: Speed) -> str:
    return (
        f"all-reduce {_gb(speed.reduce)}, all-gather {_gb(speed.gather)}, "
        f"{speed.latency_seconds * 1e6:,.0f} us"
    )


def _worst(speed: Speed | None) -> float:
    return min(speed.reduce, speed.gather, speed.send) if speed else 0.0


def _find_best(rates: Mapping[Pair, float]) -> dict[str, float]:
    """The rate of the fastest pair of each node."""
    best: dict[str, float] = {}
    for pair, rate in rates.items():
        for node in pair:
            best[node] = max(rate, best.get(node, 0.0))
    return best


def _find_usual(best: Mapping[str, float]) -> float:
    return median_high(best.values()) if best else 0.0


def slowest(speeds: Sequence[Speed], ranks: int) -> Speed | None:
    """What a group as a whole reached, that of the rank that waited longest, if all `ranks` did."""
    if len(speeds) < ranks:
        return None
    return Speed(
        min(speed.reduce for speed in speeds),
        min(speed.gather for speed in speeds),
        min(speed.send for speed in speeds),
        max(speed.latency_seconds for speed in speeds),
    )


def _send(tensor: "torch.Tensor", rank: int) -> None:
    """There and back: from rank 0 to rank 1, then the other way."""
    from torch import distributed

    if rank == 0:
        distributed.send(tensor, 1)
        distributed.recv(tensor, 1)
    else:
        distributed.recv(tensor, 0)
        distributed.send(tensor, 0)


def _await(device: "torch.device") -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gb(rate: float) -> str:
    return f"{rate / GB:.2f} GB/s"
