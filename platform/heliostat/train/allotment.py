"""How many workers a run may have now: its driver says it, Ray's controller and workers hear it."""

from contextlib import suppress

from ray.exceptions import RayError
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_put,
)

from heliostat.train.job import Job

ALLOTMENT, SIZE = "allotment", "size"


def allot(job: Job, workers: int) -> bool:
    """Let the run have at most so many workers; with 0 it saves where it is, and ends.

    Whether that is news.
    """
    return _write(job, ALLOTMENT, workers)


def find_allotment(job: Job) -> int | None:
    """None if nobody has said anything, or the run has ended."""
    return _read(job, ALLOTMENT)


def report_size(job: Job, workers: int) -> None:
    """Say how many workers there are; the first of them does."""
    _write(job, SIZE, workers)


def find_size(job: Job) -> int | None:
    """How many workers began last; None before the first did."""
    return _read(job, SIZE)


def forget(job: Job) -> None:
    with suppress(RayError, RuntimeError):  # the cluster may be gone, and what was said in it too
        for what in (ALLOTMENT, SIZE):
            _internal_kv_del(_key(job, what))


def _write(job: Job, what: str, workers: int) -> bool:
    if _read(job, what) == workers:
        return False
    _internal_kv_put(_key(job, what), str(workers), overwrite=True)
    return True


def _read(job: Job, what: str) -> int | None:
    said = _internal_kv_get(_key(job, what))
    return int(said) if said else None


def _key(job: Job, what: str) -> str:
    return f"heliostat-{what}-{job.reader}"
