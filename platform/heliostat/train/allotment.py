"""How many workers a run may have now: its driver says it, Ray's controller and workers hear it."""

from contextlib import suppress

from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_put,
)

from heliostat.train.job import Job


def allot(job: Job, workers: int) -> None:
    """Let the run have at most so many workers; with 0 it saves where it is, and ends."""
    _internal_kv_put(_key(job), str(workers), overwrite=True)


def find_allotment(job: Job) -> int | None:
    """None if nobody has said anything, or the run has ended."""
    said = _internal_kv_get(_key(job))
    return int(said) if said else None


def forget(job: Job) -> None:
    with suppress(Exception):  # the cluster may be gone, and what was said in it as well
        _internal_kv_del(_key(job))


def _key(job: Job) -> str:
    return f"heliostat-allotment-{job.reader}"
