"""Versions to deploy, clients that ask them without a pause, and what a cluster then runs."""

import shlex
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import safetensors.torch
import torch
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.job_submission import JobStatus, JobSubmissionClient

from drafting import draft
from heliostat import registry
from heliostat.data.features import ImageFeatures, input_of
from heliostat.local import Cluster
from heliostat.models import build
from heliostat.serve.deploy import APPLICATION
from heliostat.serve.deploy import deploy as release
from heliostat.signature import Classes, Signature
from heliostat.spec import RunSpec, dump, parse
from heliostat.storage import Store, connect

REPOSITORY = Path(__file__).parents[1]
FEATURES = ImageFeatures(8, 8, 1, (0.5,), (0.25,))
LABELS = tuple("0123456789")
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8)).astype(np.uint8)
INSTANCES = {"instances": PIXELS.tolist()}

Wait = Callable[..., None]


def deploy(spec: RunSpec) -> str:
    return release(connect(spec.root), spec.name, spec.deploy)


def make_spec(root: str, name: str = "digits", **deploy: Any) -> RunSpec:
    """Without keys, unless `auth` is asked for."""
    return parse(
        {
            "name": name,
            "root": root,
            "data": {"source": "raw"},
            "model": {"kind": "mlp", "hidden": [16]},
            "deploy": {"auth": False, **deploy},
        }
    )


def publish(store: Store, seed: int, name: str = "digits") -> registry.Version:
    """A version with random weights."""
    torch.manual_seed(seed)
    spec = make_spec(store.uri, name)
    model = build(spec.model, Signature(input_of(FEATURES), Classes(LABELS)))
    made = draft(name, FEATURES, Classes(LABELS), spec=dump(spec), run=f"run-{seed}")
    return registry.publish(store, made, safetensors.torch.save(model.state_dict()))


def predict_online(url: str) -> tuple[int, np.ndarray[Any, Any]]:
    response = httpx.post(url, json=INSTANCES, timeout=30)
    assert response.status_code == 200, response.text
    answer = response.json()
    rows = [list(row["probabilities"].values()) for row in answer["predictions"]]
    return answer["version"], np.array(rows, dtype=np.float32)


@contextmanager
def steady_load(url: str, num_clients: int = 3, every_s: float = 0.0) -> Iterator[Counter[object]]:
    """Clients that ask without a pause, or with one of `every_s`; counts answers by (status,
    version) or kind of failure."""
    answers: Counter[object] = Counter()
    done = threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=30) as client:
            while not done.is_set():
                try:
                    response = client.post(url, json=INSTANCES)
                    answers[response.status_code, response.json().get("version")] += 1
                except httpx.HTTPError as error:
                    answers[repr(error)] += 1
                done.wait(every_s)

    with ThreadPoolExecutor(num_clients) as pool:
        clients = [pool.submit(ask) for _ in range(num_clients)]
        try:
            yield answers
        finally:
            done.set()
        for client in clients:
            client.result()


def count_failed(answered: Counter[object]) -> int:
    """The requests of `steady_load` that were not answered with 200."""
    good = [kind for kind in answered if isinstance(kind, tuple) and kind[0] == 200]
    return answered.total() - sum(answered[kind] for kind in good)


def remove(client: ServeSubmissionClient, wait_until: Wait) -> None:
    """Take the application off the cluster."""
    options = client.get_serve_details()["http_options"]
    client.deploy_applications({"http_options": options, "applications": []})
    wait_until(lambda: APPLICATION not in client.get_serve_details()["applications"], 60)


def find_application(client: ServeSubmissionClient) -> dict[str, Any]:
    application: dict[str, Any] = client.get_serve_details()["applications"][APPLICATION]
    return application


def list_replicas(client: ServeSubmissionClient) -> list[dict[str, Any]]:
    replicas = find_application(client)["deployments"]["Replica"]["replicas"]
    return [replica for replica in replicas if replica["state"] == "RUNNING"]


def submit_deploy(
    cluster: Cluster, store: Store, spec: Path, wait_until: Wait, *overrides: str
) -> str:
    """Deploy digits:1 by `ray job submit ... jobs/deploy.py`; the last line that it prints."""
    spec.write_text(
        f"{{name: digits, root: '{store.uri}', data: {{source: raw}}, model: {{kind: mlp}}, "
        "deploy: {auth: off}}"
    )
    settings = ("deploy.version=1", *overrides)
    jobs = JobSubmissionClient(cluster.dashboard_url)
    job = jobs.submit_job(
        entrypoint=shlex.join([sys.executable, "deploy.py", str(spec), *settings]),
        runtime_env={
            "working_dir": str(REPOSITORY / "jobs"),
            "py_modules": [str(REPOSITORY / "platform" / "heliostat")],
        },
    )
    wait_until(lambda: jobs.get_job_status(job).is_terminal(), 120)
    assert jobs.get_job_status(job) == JobStatus.SUCCEEDED, jobs.get_job_logs(job)
    return str(jobs.get_job_logs(job)).strip().splitlines()[-1]


def answers(url: str) -> bool:
    try:
        return predict_online(url)[0] > 0
    except (httpx.HTTPError, AssertionError, ValueError, KeyError):
        return False


def forget_packages(address: str) -> int:
    """Delete every package of a job from the cluster, as Ray does 600 s after the upload."""
    gcs = GcsClient(address=address)
    keys: list[bytes] = gcs.internal_kv_keys(b"gcs://", namespace=None)
    for key in keys:
        gcs.internal_kv_del(key, False, namespace=None)
    return len(keys)
