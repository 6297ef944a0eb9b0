"""A run's turn on the cluster: wait for it in the queue, hold it, give it back when asked to."""

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.core.generated import gcs_pb2

from heliostat import pools
from heliostat.errors import HeliostatError
from heliostat.queue import NOTHING, Amount, Decision, Room, Run, Shrink, Ticket, Yield
from heliostat.spec import RunSpec
from heliostat.storage import Store
from heliostat.tickets import Board, Measure, Stand, keep_alive
from heliostat.train.allotment import allot, find_size
from heliostat.train.job import Job

WAITING_SECONDS = 1.0
RUNNING_SECONDS = 2.0
REPLICA = "ServeReplica:"
HOLDING = ("ALIVE", "PENDING_CREATION")


@dataclass
class Turn:
    """A run in the queue; `is_over` once its workers were told to save and to end."""

    stand: Stand
    measure: Measure
    is_over: bool = False
    _telling: threading.Lock = field(default_factory=threading.Lock)

    def wait(self) -> int:
        """How many workers it may have, once it may have any; says why as long as it waits."""
        self.is_over = False
        said = ""
        while not isinstance(decision := self.stand.look(self.measure), Run):
            if decision.reason != said:
                print(f"in the queue: {decision.reason}", flush=True)
                said = decision.reason
            time.sleep(WAITING_SECONDS)
        if said:
            print(f"its turn: {decision.workers} workers", flush=True)
        return decision.workers

    def give_back(self) -> None:
        """Say that its workers have ended: it waits again."""
        self.stand.hold(0)

    def end(self, job: Job) -> None:
        """Tell the workers to save and to end, whatever the queue decides from now on."""
        with self._telling:
            self.is_over = True
            allot(job, 0)

    @contextlib.contextmanager
    def follow(self, job: Job) -> Iterator[None]:
        """Within, what the queue decides is told to the workers of `job`, and what they have done
        to the queue."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(RUNNING_SECONDS):
                with contextlib.suppress(Exception):  # the bucket or Ray's store is away: ask again
                    self._obey(job, self.stand.look(self.measure))

        thread = threading.Thread(target=watch, name="turn", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _obey(self, job: Job, decision: Decision) -> None:
        with self._telling:
            match decision:
                case _ if self.is_over:
                    return
                case Yield(reason):
                    print(f"giving all workers back: {reason}", flush=True)
                    self.is_over = True
                    allot(job, 0)
                case Shrink(workers, reason) if (find_size(job) or workers + 1) > workers:
                    if allot(job, workers):
                        print(f"going on with {workers} workers: {reason}", flush=True)
                case Shrink(workers):
                    self.stand.hold(workers)
                case Run(workers):
                    allot(job, workers)


@contextlib.contextmanager
def line_up(store: Store, run: RunSpec, name: str) -> Iterator[Turn]:
    """A place in the queue for the run within, which is given up at its end."""
    context = ray.get_runtime_context()
    cluster = find_head()
    train, pool = run.train, pools.find_pool("training")
    ticket = Ticket(
        f"{context.get_job_id()}-{secrets.token_hex(4)}",
        arrival=-1,
        what=f"run {name}",
        worker=Amount(train.cpus_per_worker, train.gpus_per_worker),
        # What reads rows and scores is in another pool than the workers, if there are pools.
        beside=NOTHING if pool else Amount(1 + train.validate_async),
        fewest=train.fewest_workers,
        most=train.most_workers,
        priority=run.job.priority,
        team=run.job.team,
    )
    stand = Stand(store, cluster, ticket)
    stop_renewing = keep_alive(stand)

    def measure(board: Board) -> Room:
        queued = list_jobs(board) | {context.get_job_id()}
        return measure_pool(queued, pool) if pool else measure_room(queued)

    try:
        yield Turn(stand, measure)
    finally:
        stop_renewing()
        with contextlib.suppress(HeliostatError):  # the others will see that nobody renews it
            stand.leave()


def find_head() -> str:
    """The id of the head's node, which names the cluster: no job outlives it."""
    return next(
        str(node["NodeID"])
        for node in ray.nodes()
        if node["Alive"] and HEAD_NODE_RESOURCE_NAME in node["Resources"]
    )


def list_jobs(board: Board) -> set[str]:
    """The jobs of Ray, by their ids, that stand in the queue."""
    return {ticket.id.partition("-")[0] for ticket in board.tickets}


def list_largest(pool: pools.Most) -> Room:
    """A pool with all its machines, whether they are there yet or not."""
    return Room((Amount(pool.cpus, pool.gpus),) * pool.machines)


def measure_pool(queued: set[str], pool: pools.Most) -> Room:
    """The training pool at its largest, and what jobs hold of it that do not stand in the queue."""
    held = (_amount(one) for one in _list_held(queued, ()) if "training" in one)
    return replace(list_largest(pool), others=sum(held, NOTHING))


def measure_room(queued: set[str]) -> Room:
    """What the nodes that stay have, and what jobs hold that do not stand in the queue. A replica
    that waits for its place counts, if any node could hold it: served models go first."""
    state = ray._private.state.state
    draining = state.get_draining_nodes()
    nodes = tuple(
        _amount(node["Resources"])
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in draining
    )
    return Room(nodes, sum(map(_amount, _list_held(queued, nodes)), NOTHING))


def _list_held(queued: set[str], nodes: Sequence[Amount]) -> Iterator[Mapping[str, float]]:
    """The resources of actors and placement groups of jobs that are not `queued`."""
    accessor = ray._private.state.state._connect_and_get_accessor()
    for status in HOLDING:
        for data in accessor.get_actor_table(None, status):
            actor = gcs_pb2.ActorTableData.FromString(data)
            need = actor.required_resources
            counts = status == "ALIVE" or (
                actor.class_name.startswith(REPLICA)
                and any(node.holds(_amount(need)) for node in nodes)
            )
            is_grouped = bool(actor.placement_group_id.strip(b"\xff"))
            if counts and not is_grouped and actor.job_id.hex() not in queued:
                yield need
    for data in accessor.get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(data)
        if group.state == group.CREATED and group.creator_job_id.hex() not in queued:
            yield from (bundle.unit_resources for bundle in group.bundles)


def _amount(resources: Mapping[str, float]) -> Amount:
    return Amount(resources.get("CPU", 0.0), resources.get("GPU", 0.0))
