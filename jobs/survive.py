"""Train twice, the second time with a worker killed on the way, and compare the two curves.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- \\
    python jobs/survive.py jobs/specs/digits.yaml train.checkpoint_steps=50
"""

import json
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import ray
from ray.util.state import list_actors

from heliostat import spec, storage
from heliostat.data.manifest import check_shards
from heliostat.data.prepare import require_prepared
from heliostat.errors import HeliostatError
from heliostat.job import run
from heliostat.storage import Store
from heliostat.train import checkpoint
from heliostat.train.launch import train

LOOK_SECONDS = 0.1


def main(path: str, *overrides: str) -> None:
    try_ = secrets.token_hex(4)
    calm, killed = (
        spec.load(path, (*overrides, f"train.run={name}-{try_}")) for name in ("calm", "killed")
    )
    store = storage.connect(calm.root)
    storage.probe(store)
    manifest = require_prepared(calm)
    check_shards(store, manifest)
    undisturbed = train(calm, manifest)
    ended = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        killing = thread.submit(kill_worker, store, killed.train.run or "", ended)
        try:
            disturbed = train(killed, manifest)
        finally:
            ended.set()
    if not killing.result():
        raise HeliostatError(
            "no worker was killed: the run ended before it had a checkpoint (lower "
            "train.checkpoint_steps), or none of its workers is on the machine of this job"
        )
    compare(*(read_curve(store, one.train.run or "") for one in (calm, killed)))
    if undisturbed.weights != disturbed.weights:
        raise HeliostatError("the weights of the two runs differ")
    print("the weights of the two runs are equal, bit for bit")


def kill_worker(store: Store, name: str, ended: threading.Event) -> bool:
    """SIGKILL a worker of this job once there is a checkpoint; False if it ended before."""
    while not checkpoint.committed(store, name):
        if ended.wait(LOOK_SECONDS):
            return False
    job = ray.get_runtime_context().get_job_id()
    wanted = {"class_name": "RayTrainWorker", "state": "ALIVE", "job_id": job}
    for actor in list_actors(filters=[(key, "=", value) for key, value in wanted.items()]):
        if psutil.pid_exists(actor.pid):
            psutil.Process(actor.pid).kill()
            print(f"killed the worker with process id {actor.pid}", flush=True)
            return True
    return False


def read_curve(store: Store, name: str) -> dict[int, float]:
    """The mean loss of the steps up to each checkpoint."""
    points = [json.loads(store.read(one.key)) for one in store.list(f"runs/{name}/progress/")]
    return {point["step"]: point["loss"] for point in points}


def compare(calm: dict[int, float], killed: dict[int, float]) -> None:
    """Raises HeliostatError if the curves differ; the kill may cost the point that it came upon."""
    print(f"{'step':>8}  {'undisturbed':>14}  {'killed':>14}")
    for step in sorted({*calm, *killed}):
        losses = [curve.get(step, float("nan")) for curve in (calm, killed)]
        print(f"{step:>8,}  {losses[0]:>14.9f}  {losses[1]:>14.9f}")
    if not killed.items() <= calm.items() or len(killed) < len(calm) - 1:
        raise HeliostatError("the two curves differ")


if __name__ == "__main__":
    run(main)
