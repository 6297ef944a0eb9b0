"""One worker of a run as Ray Train starts it: its process group, its place, and what ends it."""

import os
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress

import ray
import ray.train
import ray.train.collective
import ray.util
import torch
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from heliostat import storage
from heliostat.data import stream
from heliostat.environment import STAND_IN
from heliostat.errors import HeliostatError
from heliostat.train.allotment import find_allotment, report_size
from heliostat.train.gauges import Gauges
from heliostat.train.job import Job, failure_key
from heliostat.train.lease import Superseded
from heliostat.train.loop import Ranks
from heliostat.train.rank import Place, train_rank

# More than the other workers of Ray, replicas too, have: of a core that both use they get 2.4 times
# as much (1.25 for each step of niceness, sched(7)).
NICENESS = 4
NOTICE_SECONDS = 1.0


def work(job: Job) -> None:
    """Train one rank; a failure that a retry cannot mend is written down and ends the run.

    What a served model on the same machine is asked comes first.
    """
    os.nice(NICENESS)  # of this thread and those that it starts
    # Said once by every worker of a network with one input channel; it costs nothing here.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    try:
        place = _find_place(job)
        _join(place.ranks, place.device)
        train_rank(job, place)
    except Superseded:  # another goes on, which must not end by what this one says
        raise
    except HeliostatError as error:
        storage.connect(job.spec.root).write(failure_key(job), str(error).encode())
        raise
    distributed.destroy_process_group()


def _find_place(job: Job) -> Place:
    context = ray.train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size())
    if ranks.rank == 0:
        report_size(job, ranks.world_size)
    return Place(
        ranks,
        _find_device(job.spec.train.gpus_per_worker),
        context.get_local_world_size(),
        stream.fetch_from(ray.get_actor(job.reader)),
        _watch_for_notice(job, ranks),
        [Gauges(job.run)] if ranks.rank == 0 else [],
    )


def _find_device(gpus: int) -> torch.device:
    if not gpus or (STAND_IN in os.environ and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise HeliostatError(
            f"Ray gave this worker of node {ray.util.get_node_ip_address()} a GPU and PyTorch "
            f"{torch.__version__} finds none: install a build of PyTorch for CUDA there, or the "
            "driver of the GPU"
        )
    from ray.train.torch import get_device  # takes seconds

    device: torch.device = get_device()
    return device


def _join(ranks: Ranks, device: torch.device) -> None:
    """Make the process group. The worker with rank 0 tells the others where it listens."""
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    host = ray.util.get_node_ip_address()
    first = ranks.rank == 0
    size = ranks.world_size
    made = TCPStore(host, 0, size, True, wait_for_workers=False) if first else None
    host, port = ray.train.collective.broadcast_from_rank_zero(made and (host, made.port))
    meeting = made or TCPStore(host, port, size, False)
    distributed.init_process_group(
        "nccl" if gpu else "gloo", store=meeting, rank=ranks.rank, world_size=size
    )


def _watch_for_notice(job: Job, ranks: Ranks) -> Callable[[], bool]:
    """Whether the workers are to save and end, as a thread finds out: the node of this one will be
    taken away, or the run may have fewer workers than it has.

    Ray Train has an actor for it, a process more that starts just when the workers do.
    """
    noticed = threading.Event()
    node = ray.get_runtime_context().get_node_id()

    def is_too_large() -> bool:
        if ranks.rank:
            return False
        allotted = find_allotment(job)
        return allotted is not None and allotted < ranks.world_size

    def watch() -> None:
        while not noticed.wait(NOTICE_SECONDS):
            with suppress(Exception):  # Ray's control store is away for a while: ask again
                if node in ray._private.state.state.get_draining_nodes() or is_too_large():
                    noticed.set()

    threading.Thread(target=watch, name="notice", daemon=True).start()
    return noticed.is_set
