"""The settings, ports and machine bounds that every Ray of Heliostat starts with, as values."""

from dataclasses import dataclass

from heliostat.errors import HeliostatError

GIB = 2**30
MIN_LOGICAL_CPUS = 4
# Where a deployed model answers, for the jobs that print it.
EDGE_URL = "HELIOSTAT_EDGE_URL"
# The address that the edge listens on, which says who can reach it.
EDGE_HOST = "HELIOSTAT_EDGE_HOST"
# Set on a node that stands for a machine: a GPU that it declares need not be there.
STAND_IN = "HELIOSTAT_STAND_IN"
STORE_PORT_OFFSET = 10_000
REPLICA_PORTS = 100
PREFERRED_PORTS = {"s3": 8333, "dashboard": 8265, "gcs": 6379, "serve": 8000, "edge": 8080}


@dataclass(frozen=True)
class Ports:
    """The ports of one cluster on one machine; `replicas` is the first of REPLICA_PORTS.

    Every port of the store (`s3`, `store_*`) takes the port STORE_PORT_OFFSET above it as well.
    """

    s3: int
    dashboard: int
    gcs: int
    serve: int
    edge: int
    store_master: int
    store_volume: int
    store_filer: int
    store_admin: int
    ray_client: int
    autoscaler_metrics: int
    dashboard_metrics: int
    serve_fallback: int
    serve_metrics: int
    serve_stats: int
    replicas: int


@dataclass(frozen=True)
class Setting:
    """One environment variable of the Ray processes and why it is not left at its default."""

    name: str
    value: str
    reason: str


REQUIRED = (
    Setting("RAY_AUTH_MODE", "token", "`ray start` leaves authentication off in Ray 2.60"),
    Setting("RAY_SERVE_ENABLE_HA_PROXY", "1", "the Python proxy serves a sixth of the requests"),
    Setting("RAY_USAGE_STATS_ENABLED", "0", "nothing is reported to anybody"),
    Setting("SPT_NOENV", "1", "process titles must not overwrite what `down` knows its own by"),
)
TUNED = (
    Setting("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1", "user code in the replica's own event loop"),
    Setting("RAY_SERVE_HAPROXY_METRICS_ENABLED", "0", "replicas count; not a line each to Python"),
    Setting("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "0.3", "a dead proxy is missed after 1 s"),
    Setting("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "5", "a busy one is not dead"),
    Setting("RAY_SERVE_HAPROXY_RETRY_ON", "conn-failure empty-response", "a replica was killed"),
    Setting("RAY_SERVE_HAPROXY_RETRIES", "6", "a second each: it hears late of new replicas"),
    Setting("RAY_JOB_STOP_WAIT_TIME_S", "30", "a stopped job may finish its checkpoint, not 3 s"),
    Setting("RAY_JOB_START_TIMEOUT_SECONDS", "120", "a job that cannot begin fails in 2 minutes"),
    Setting("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", "30", "not 3 minutes for a dead reader"),
    Setting("RAY_worker_niceness", "5", "with 15 any idle daemon holds up a step: 5 % in all"),
    Setting("RAY_health_check_initial_delay_ms", "5000", "a node is watched once it is up"),
    Setting("RAY_health_check_period_ms", "1000", "a dead node is found after 3 refused checks"),
    Setting("RAY_health_check_timeout_ms", "5000", "a busy node of two cores is not a dead one"),
    Setting("RAY_health_check_failure_threshold", "3", "3 s for a dead node, 18 s for a hung one"),
)
TRAIN = (
    Setting("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5", "what the end of a run waits for"),
    Setting("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20", "then sized anew by what is there now"),
    Setting("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0", "a process more; workers look themselves"),
    Setting("RAY_TRAIN_ENABLE_PRINT_PATCH", "0", "a worker's line appears once in the job's log"),
)
# For every process of a laptop's cluster, drivers included; with it Ray keeps to 127.0.0.1 as it
# does on macOS, and without it takes "127.0.0.1" for the address of the network card.
LOOPBACK = Setting("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0", "nobody on the network reaches it")


@dataclass(frozen=True)
class MachineBounds:
    """What a Ray node may use of its machine; bytes."""

    logical_cpus: int
    object_store_bytes: int
    memory_bytes: int


def bound_machine(cores: int, memory_bytes: int) -> MachineBounds:
    """The share of a machine with `cores` and `memory_bytes` that goes to Ray.

    At least 4 logical CPUs: with 2, two training workers take both and Ray Data waits for ever.
    A fifth of the memory, at most 8 GiB, holds objects; half is for tasks and actors.
    """
    return MachineBounds(
        logical_cpus=max(MIN_LOGICAL_CPUS, cores),
        object_store_bytes=min(memory_bytes // 5, 8 * GIB),
        memory_bytes=memory_bytes // 2,
    )


def check_cpus(
    cluster_cpus: int, workers: int, cpus_per_worker: int, scoring: bool = False
) -> None:
    """Refuse a training run whose workers leave no CPU for reading data, and one for `scoring`.

    Raises:
        HeliostatError: the workers take too many CPUs, so Ray Data would wait for ever in silence.
    """
    taken, needed = workers * cpus_per_worker, 1 + scoring
    if taken + needed <= cluster_cpus:
        return
    others = "reading data and one for scoring checkpoints" if scoring else "reading data"
    raise HeliostatError(
        f"train.workers={workers} x {cpus_per_worker} CPU take {taken} of the {cluster_cpus} CPUs "
        f"of the cluster and leave none for {others}: use at most "
        f"{max(cluster_cpus - needed, 0) // cpus_per_worker} workers or a larger cluster"
    )
