"""A run and a served model on one cluster, which has room for both and no core to spare."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
import pytest
import ray
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.util.state import list_actors

from datasets import store_images
from deploying import INSTANCES, Wait, count_failed, deploy, list_replicas, make_spec, steady_load
from heliostat.spec import parse
from heliostat.storage import Store
from heliostat.train import goodput
from heliostat.train.launch import train

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

STEPS, RUN, REQUESTS = 600, "beside", 400


def measure_ms(url: str) -> tuple[float, float]:
    """The median and the 99th percentile of REQUESTS answers, one after another."""
    seconds = []
    with httpx.Client(timeout=30) as client:
        for _ in range(REQUESTS):
            began = time.perf_counter()
            client.post(url, json=INSTANCES).raise_for_status()
            seconds.append(time.perf_counter() - began)
    median, slowest = np.quantile(seconds, (0.5, 0.99))
    return 1000 * median, 1000 * slowest


def test_a_run_and_a_served_model_both_go_on_and_requests_come_first(
    store: Store, digits: str, serve_client: ServeSubmissionClient, wait_until: Wait
) -> None:
    ray.init(ignore_reinit_error=True, logging_level="ERROR", log_to_driver=False)
    deploy(make_spec(store.uri, version=1))
    manifest = store_images(store, {"train": 6000}, rows_per_shard=1024, rows_per_group=1024)
    section = {"workers": 2, "run": RUN, "epochs": 500, "steps": STEPS, "global_batch": 512}
    model = {"kind": "mlp", "hidden": [1024, 1024, 1024]}
    run = parse(
        {
            "name": "tiny",
            "root": store.uri,
            "data": {"source": "unused"},
            "model": model,
            "train": section,
        }
    )
    alone = measure_ms(digits)
    with ThreadPoolExecutor(1) as thread, steady_load(digits, 1, every_s=0.01) as answered:
        pending = thread.submit(train, run, manifest)
        wait_until(lambda: reached(store) > 0 or pending.done(), 120)
        (replica,) = list_replicas(serve_client)
        alive = [("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")]
        workers = [find_niceness(actor.pid) for actor in list_actors(filters=alive)]
        beside = measure_ms(digits)
        result = pending.result()
    print(
        f"\nrequests, median and 99 %: alone {alone[0]:.1f} and {alone[1]:.1f} ms, "
        f"beside a run {beside[0]:.1f} and {beside[1]:.1f} ms"
    )
    assert result.step == STEPS
    assert count_failed(answered) == 0, answered
    assert len(workers) == 2
    assert min(workers) > find_niceness(replica["pid"])


def find_niceness(pid: int) -> int:
    """Of the thread of a process that is last in the line for a core."""
    threads = psutil.Process(pid).threads()
    return max(os.getpriority(os.PRIO_PROCESS, thread.id) for thread in threads)


def reached(store: Store) -> int:
    return max((attempt.step for attempt in goodput.load_attempts(store, RUN)), default=0)
