"""A run under repeated kills: what it gives, and how much of its time makes progress."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import ray
from ray.util.state import list_actors

from datasets import store_images
from heliostat import spec, storage
from heliostat.storage import Store
from heliostat.train import goodput
from heliostat.train.launch import train

pytestmark = [pytest.mark.cluster, pytest.mark.soak]


STEPS, KILLED_AT = 3000, (1000, 2000)
RUN = "killed"


def reached(store: Store) -> int:
    """The step that the run last told, whenever it was saved."""
    return max((attempt.step for attempt in goodput.load_attempts(store, RUN)), default=0)


def test_goodput_under_kills_is_near_what_the_best_interval_would_give(
    bucket: str, cluster: object, wait_until: Callable[..., None]
) -> None:
    ray.init(ignore_reinit_error=True, logging_level="ERROR", log_to_driver=False)
    store = storage.connect(bucket)
    manifest = store_images(store, {"train": 6000}, rows_per_shard=1024, rows_per_group=1024)
    section = {"workers": 2, "run": RUN, "epochs": 500, "steps": STEPS, "global_batch": 512}
    run = spec.parse(
        {
            "name": "tiny",
            "root": store.uri,
            "data": {"source": "unused"},
            "model": {"kind": "mlp", "hidden": [1024, 1024, 1024]},
            "train": section,
        }
    )
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(train, run, manifest)
        for step in KILLED_AT:
            wait_until(lambda step=step: reached(store) >= step or pending.done(), 300)
            workers = [("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")]
            psutil.Process(list_actors(filters=workers)[-1].pid).kill()
        assert pending.result().step == STEPS
    total = goodput.merge(goodput.load_attempts(store, RUN))
    print(total.render())
    assert total.failures == len(KILLED_AT)
    assert total.bound is not None
    assert total.share >= 0.95 * total.bound
