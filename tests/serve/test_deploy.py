"""Versions on a real cluster, over real HTTP: what is deployed is what answers, without a gap."""

import io
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import safetensors.torch
import torch
from PIL import Image
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_actors

from heliostat import registry
from heliostat.data.features import ImageFeatures, features_to_json, input_of
from heliostat.errors import HeliostatError
from heliostat.evaluate import load_predictor, predict
from heliostat.local import Cluster, processes
from heliostat.models import build
from heliostat.serve.deploy import (
    APPLICATION,
    Table,
    change_table,
    deploy,
    read_table,
    replace_model,
)
from heliostat.signature import Classes, Signature, output_to_json
from heliostat.spec import RunSpec, dump, parse
from heliostat.storage import Store, connect

REPOSITORY = Path(__file__).parents[2]
FEATURES = ImageFeatures(8, 8, 1, (0.5,), (0.25,))
LABELS = tuple("0123456789")
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8)).astype(np.uint8)
INSTANCES = {"instances": PIXELS.tolist()}

Wait = Callable[..., None]


def make_spec(root: str, name: str = "digits", **deploy: Any) -> RunSpec:
    return parse(
        {
            "name": name,
            "root": root,
            "data": {"source": "raw"},
            "model": {"kind": "mlp", "hidden": [16]},
            "deploy": deploy,
        }
    )


def publish(store: Store, seed: int, name: str = "digits") -> registry.Version:
    """A version with random weights."""
    torch.manual_seed(seed)
    spec = make_spec(store.uri, name)
    model = build(spec.model, Signature(input_of(FEATURES), Classes(LABELS)))
    draft = registry.Draft(
        name=name,
        output=output_to_json(Classes(LABELS)),
        features=features_to_json(FEATURES),
        spec=dump(spec),
        data_name=name,
        data_version="0" * 16,
        run=f"run-{seed}",
        step=1,
        code="",
        metrics={},
    )
    return registry.publish(store, draft, safetensors.torch.save(model.state_dict()))


def publish_misfit(store: Store) -> registry.Version:
    """A version whose weights are whole but belong to larger images than its features say."""
    good = registry.resolve(store, "digits:1")
    known = {field.name: getattr(good, field.name) for field in fields(registry.Draft)}
    larger = features_to_json(ImageFeatures(16, 16, 1, (0.5,), (0.25,)))
    draft = registry.Draft(**known | {"features": larger, "run": "misfit"})
    return registry.publish(store, draft, registry.load_weights(store, good))


def predict_offline(store: Store, ref: str) -> np.ndarray[Any, Any]:
    predictor = load_predictor(store, registry.resolve(store, ref))
    return predict(predictor, {"image": PIXELS[..., np.newaxis]})


def predict_online(url: str) -> tuple[int, np.ndarray[Any, Any]]:
    answer = httpx.post(url, json=INSTANCES, timeout=30).raise_for_status().json()
    rows = [list(row["probabilities"].values()) for row in answer["predictions"]]
    return answer["version"], np.array(rows, dtype=np.float32)


@contextmanager
def steady_load(url: str, num_clients: int = 3) -> Iterator[Counter[object]]:
    """Clients that ask without a pause; counts answers by (status, version) or kind of failure."""
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

    with ThreadPoolExecutor(num_clients) as pool:
        clients = [pool.submit(ask) for _ in range(num_clients)]
        try:
            yield answers
        finally:
            done.set()
        for client in clients:
            client.result()


@pytest.fixture(scope="module")
def serve_client(cluster: Cluster, wait_until: Wait) -> Iterator[ServeSubmissionClient]:
    """Serve's own interface; what was deployed is gone afterwards."""
    client = ServeSubmissionClient(cluster.dashboard_url)
    yield client
    remove(client, wait_until)


def remove(client: ServeSubmissionClient, wait_until: Wait) -> None:
    """Take the application off the cluster."""
    options = client.get_serve_details()["http_options"]
    client.deploy_applications({"http_options": options, "applications": []})
    wait_until(lambda: APPLICATION not in client.get_serve_details()["applications"], 60)


@pytest.fixture(scope="module")
def store(cluster: Cluster, serve_client: ServeSubmissionClient) -> Store:
    """A registry with digits:1 and digits:2."""
    store = connect(f"{cluster.root}/serve-{os.getpid()}")
    publish(store, 1)
    publish(store, 2)
    return store


def find_application(client: ServeSubmissionClient) -> dict[str, Any]:
    application: dict[str, Any] = client.get_serve_details()["applications"][APPLICATION]
    return application


def list_replicas(client: ServeSubmissionClient) -> list[dict[str, Any]]:
    replicas = find_application(client)["deployments"]["Replica"]["replicas"]
    return [replica for replica in replicas if replica["state"] == "RUNNING"]


def submit_deploy(cluster: Cluster, store: Store, spec: Path, wait_until: Wait) -> str:
    """Deploy digits:1 by `ray job submit ... jobs/deploy.py`; the last line that it prints."""
    spec.write_text(
        f"{{name: digits, root: '{store.uri}', data: {{source: raw}}, model: {{kind: mlp}}}}"
    )
    jobs = JobSubmissionClient(cluster.dashboard_url)
    job = jobs.submit_job(
        entrypoint=f"{sys.executable} deploy.py {spec} deploy.version=1",
        runtime_env={
            "working_dir": str(REPOSITORY / "jobs"),
            "py_modules": [str(REPOSITORY / "platform" / "heliostat")],
        },
    )
    wait_until(lambda: jobs.get_job_status(job).is_terminal(), 120)
    assert jobs.get_job_status(job) == JobStatus.SUCCEEDED, jobs.get_job_logs(job)
    return str(jobs.get_job_logs(job)).strip().splitlines()[-1]


def list_addresses(replica: dict[str, Any]) -> list[str]:
    """Where a replica process itself listens."""
    connections = psutil.Process(replica["pid"]).net_connections("tcp")
    return [
        f"http://127.0.0.1:{connection.laddr.port}"
        for connection in connections
        if connection.status == psutil.CONN_LISTEN
    ]


def answers(url: str) -> bool:
    try:
        return predict_online(url)[0] > 0
    except (httpx.HTTPError, ValueError, KeyError):
        return False


def forget_packages(address: str) -> int:
    """Delete every package of a job from the cluster, as Ray does 600 s after the upload."""
    gcs = GcsClient(address=address)
    keys: list[bytes] = gcs.internal_kv_keys(b"gcs://", namespace=None)
    for key in keys:
        gcs.internal_kv_del(key, False, namespace=None)
    return len(keys)


@pytest.fixture(scope="module")
def digits(
    cluster: Cluster,
    store: Store,
    tmp_path_factory: pytest.TempPathFactory,
    wait_until: Wait,
) -> str:
    """Where digits answers, after a job like a user's has deployed its first version."""
    spec = tmp_path_factory.mktemp("specs") / "digits.yaml"
    return submit_deploy(cluster, store, spec, wait_until)


@pytest.mark.cluster
def test_a_job_deploys_what_answers_as_the_model_does_offline(
    cluster: Cluster, store: Store, digits: str
) -> None:
    assert digits == f"{cluster.edge_url}/v1/models/digits:predict"
    version, online = predict_online(digits)
    assert version == 1
    np.testing.assert_allclose(online, predict_offline(store, "digits:1"), atol=1e-6)


@pytest.mark.cluster
def test_an_image_file_answers_as_its_pixels_do(digits: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(buffer, "PNG")
    png = {"content-type": "image/png"}
    answer = httpx.post(digits, content=buffer.getvalue(), headers=png).raise_for_status()
    same = httpx.post(digits, json={"instances": [PIXELS[0].tolist()]})
    assert answer.json() == same.json()


@pytest.mark.cluster
def test_bad_requests_over_http_are_4xx_and_the_next_good_one_is_answered(digits: str) -> None:
    json_type = {"content-type": "application/json"}
    chunks = (b"[" * 65_536 for _ in range(1_000))
    unknown = digits.replace("digits", "unknown")
    with httpx.Client(headers=json_type, timeout=30) as client:
        statuses = [
            client.post(digits, content=chunks).status_code,
            client.post(digits, content=b"[" * 9 * 2**20).status_code,
            client.post(digits, content=b"\xff").status_code,
            client.post(digits, content=b"[" * 200_000).status_code,
            client.post(digits, content=b'{"instances": [NaN]}').status_code,
            client.post(digits, json={"instances": [PIXELS[0].tolist(), "x"]}).status_code,
            client.post(unknown, json=INSTANCES).status_code,
            client.get(digits).status_code,
            client.get(digits.replace("/v1/", "/v2/")).status_code,
        ]
    assert statuses == [413, 413, 400, 400, 400, 422, 404, 405, 404]
    assert httpx.post(digits, json=INSTANCES).status_code == 200


@pytest.mark.cluster
def test_replicas_need_nothing_of_a_job_to_scale(
    cluster: Cluster, store: Store, digits: str, serve_client: ServeSubmissionClient
) -> None:
    actors = [actor for actor in list_actors(detail=True) if "Serve" in actor.class_name]
    environments = [actor.serialized_runtime_env for actor in actors if actor.state == "ALIVE"]
    assert f"{store.uri}/code/" in str(environments)
    assert "gcs://" not in str(environments)
    assert forget_packages(cluster.env["RAY_ADDRESS"]) >= 1
    first = list_replicas(serve_client)
    deploy(make_spec(store.uri, version=predict_online(digits)[0], replicas=2))
    replicas = list_replicas(serve_client)
    assert len(replicas) == 2
    assert first[0] in replicas
    for replica in replicas:
        own = [address + httpx.URL(digits).path for address in list_addresses(replica)]
        assert any(answers(address) for address in own)


@pytest.mark.cluster
def test_a_new_version_takes_over_without_a_lost_request(store: Store, digits: str) -> None:
    old, new = predict_online(digits)[0], publish(store, 100)
    with steady_load(digits) as answered:
        deploy(make_spec(store.uri, version=new.number))
        version, online = predict_online(digits)
    assert version == new.number
    np.testing.assert_allclose(online, predict_offline(store, new.ref), atol=1e-6)
    assert set(answered) == {(200, old), (200, version)}


@pytest.mark.cluster
def test_a_version_that_cannot_start_never_replaces_the_one_that_serves(
    store: Store, digits: str, serve_client: ServeSubmissionClient
) -> None:
    misfit, version = publish_misfit(store), predict_online(digits)[0]
    before = read_table(store), list_replicas(serve_client)
    with steady_load(digits) as answered, pytest.raises(HeliostatError) as error:
        deploy(make_spec(store.uri, version=misfit.number))
    assert f"{misfit.ref} was not deployed, digits:{version} is still" in str(error.value)
    assert "size mismatch for 1.weight" in str(error.value)
    assert set(answered) == {(200, version)}
    assert (read_table(store), list_replicas(serve_client)) == before


@pytest.mark.cluster
def test_damaged_weights_are_refused_before_anything_moves(
    store: Store, digits: str, serve_client: ServeSubmissionClient
) -> None:
    version = publish(store, 200)
    weights = bytearray(store.read(version.weights_key))
    weights[-1] ^= 1
    store.write(version.weights_key, bytes(weights))
    before = read_table(store), find_application(serve_client)["last_deployed_time_s"]
    with pytest.raises(HeliostatError, match="is not what"):
        deploy(make_spec(store.uri, version=version.number))
    after = read_table(store), find_application(serve_client)["last_deployed_time_s"]
    assert after == before


@pytest.mark.cluster
def test_models_are_deployed_beside_each_other_and_of_one_root(store: Store, digits: str) -> None:
    publish(store, 4, "letters")
    letters = deploy(make_spec(store.uri, "letters"))
    served = [("digits", predict_online(digits)[0]), ("letters", predict_online(letters)[0])]
    listed = httpx.get(digits.rpartition("/")[0]).json()["models"]
    assert [(model["name"], model["version"]) for model in listed] == served
    elsewhere = connect(f"{store.uri}-elsewhere")
    publish(elsewhere, 1)
    with pytest.raises(HeliostatError, match="serves the models of"):
        deploy(make_spec(elsewhere.uri))


@pytest.mark.cluster
@pytest.mark.faults
def test_two_deploys_at_once_end_in_one_state(store: Store, digits: str) -> None:
    specs = [make_spec(store.uri, version=2), make_spec(store.uri, "letters")]
    publish(store, 4, "letters")
    with ThreadPoolExecutor(2) as pool:
        urls = list(pool.map(deploy, specs))
    assert read_table(store).models == {"digits": 2, "letters": 1}
    assert [predict_online(url)[0] for url in urls] == [2, 1]


@pytest.mark.cluster
@pytest.mark.faults
def test_replicas_without_room_are_given_up(store: Store, digits: str) -> None:
    version, new, table = predict_online(digits)[0], publish(store, 300), read_table(store)
    with steady_load(digits, 1) as answered, pytest.raises(HeliostatError, match="did not start"):
        deploy(make_spec(store.uri, version=new.number, replicas=100, start_timeout_s=20))
    assert set(answered) <= {(200, version), (200, new.number)}
    assert predict_online(digits)[0] == version
    assert read_table(store) == table


@pytest.mark.cluster
@pytest.mark.faults
def test_a_killed_proxy_of_serve_costs_what_is_inside_and_seconds(
    cluster: Cluster, digits: str, wait_until: Wait
) -> None:
    marker, version = cluster.state.marker("ray"), predict_online(digits)[0]
    direct = f"{cluster.serve_url}/v1/models/digits:predict"
    with steady_load(digits, 3) as answered:
        wait_until(lambda: answered.total() > 100)
        killed = [p for p in processes.find(marker) if p.info["name"] == "haproxy"]
        assert killed
        for process in killed:
            process.kill()
        began = time.monotonic()
        wait_until(lambda: not answers(direct))
        wait_until(lambda: answers(direct))
        seconds, total = time.monotonic() - began, answered.total()
        wait_until(lambda: answered.total() > total + 100)
    good, later = (200, version), (503, None)
    assert sum(answered[kind] for kind in set(answered) - {good, later}) <= 3, answered
    assert seconds < 20


@pytest.mark.cluster
@pytest.mark.faults
def test_five_updates_lose_none_of_ten_thousand_requests(
    store: Store, digits: str, wait_until: Wait
) -> None:
    deploy(make_spec(store.uri, version=1))
    with steady_load(digits, 4) as answered:
        for version in (2, 1, 2, 1, 2):
            deploy(make_spec(store.uri, version=version))
        wait_until(lambda: answered.total() >= 10_000, 600)
    assert set(answered) == {(200, 1), (200, 2)}


@pytest.mark.cluster
@pytest.mark.faults
def test_a_root_on_disk_is_served_as_well(
    tmp_path: Path,
    store: Store,
    digits: str,
    serve_client: ServeSubmissionClient,
    wait_until: Wait,
) -> None:
    remove(serve_client, wait_until)
    local = connect(str(tmp_path))
    publish(local, 1)
    assert predict_online(deploy(make_spec(local.uri)))[0] == 1
    remove(serve_client, wait_until)
    deploy(make_spec(store.uri, version=1))


def test_deploys_of_many_models_at_once_lose_none(tmp_path: Path) -> None:
    store = connect(str(tmp_path))
    names = [f"model-{number}" for number in range(16)]

    def place(name: str) -> Table:
        return change_table(store, lambda table: replace_model(table, name, 1))

    with ThreadPoolExecutor(len(names)) as pool:
        before = list(pool.map(place, names))
    assert sorted(read_table(store).models) == sorted(names)
    assert sorted(len(table.models) for table in before) == list(range(len(names)))
