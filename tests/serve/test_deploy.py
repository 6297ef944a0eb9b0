"""Versions on a real cluster, over real HTTP: what is deployed is what answers, without a gap."""

import io
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from openai import OpenAI, PermissionDeniedError
from PIL import Image
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.util.state import list_actors

import writing
from deploying import (
    INSTANCES,
    PIXELS,
    REPOSITORY,
    Wait,
    answers,
    deploy,
    find_application,
    forget_packages,
    list_replicas,
    make_spec,
    predict_online,
    publish,
    remove,
    steady_load,
)
from heliostat import keys, registry, usage
from heliostat.data.features import ImageFeatures, features_to_json
from heliostat.data.tokens import parse_tokenizer, store_tokenizer
from heliostat.errors import HeliostatError
from heliostat.evaluate import load_predictor, predict
from heliostat.keys import Limits
from heliostat.local import Cluster
from heliostat.serve.deploy import APPLICATION, rollback
from heliostat.serve.engine.ask import Ask, Sampling
from heliostat.serve.ledger import LEASE_SECONDS
from heliostat.serve.table import Placement, Table, change_table, place, read_table
from heliostat.storage import Store, connect
from heliostat.usage import Sum

STANDIN = REPOSITORY / "tests" / "standin.py"


def publish_misfit(store: Store) -> registry.Version:
    """A version whose weights are whole but belong to larger images than its features say."""
    good = registry.resolve(store, "digits:1")
    known = {field.name: getattr(good, field.name) for field in fields(registry.Draft)}
    larger = features_to_json(ImageFeatures(16, 16, 1, (0.5,), (0.25,)))
    made = registry.Draft(**known | {"features": larger, "run": "misfit"})
    return registry.publish(store, made, registry.load_weights(store, good))


def predict_offline(store: Store, ref: str) -> np.ndarray[Any, Any]:
    predictor = load_predictor(store, registry.resolve(store, ref))
    return predict(predictor, {"image": PIXELS[..., np.newaxis]})


def list_addresses(replica: dict[str, Any]) -> list[str]:
    """Where a replica process itself listens."""
    connections = psutil.Process(replica["pid"]).net_connections("tcp")
    return [
        f"http://127.0.0.1:{connection.laddr.port}"
        for connection in connections
        if connection.status == psutil.CONN_LISTEN
    ]


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
@pytest.mark.faults
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


@pytest.fixture
def guarded(store: Store, digits: str) -> Iterator[str]:
    """digits behind keys, on two replicas."""
    version = read_table(store).models["digits"].number
    deploy(make_spec(store.uri, version=version, replicas=2, auth=True))
    yield digits
    deploy(make_spec(store.uri, version=version))


def ask_with(token: str, url: str, times: int = 1) -> list[httpx.Response]:
    """Each over a connection of its own, so that every replica gets some."""
    headers = bearer(token) | {"connection": "close"}
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(httpx.post, url, json=INSTANCES, headers=headers, timeout=30)
            for _ in range(times)
        ]
        return [one.result() for one in asked]


def count_statuses(responses: list[httpx.Response]) -> Counter[int]:
    return Counter(response.status_code for response in responses)


def await_known(token: str, url: str, wait_until: Wait) -> int:
    """Wait until every replica has learnt of a key by itself; how often it was let in."""
    let_in = 0

    def is_known() -> bool:
        nonlocal let_in
        asked = ask_with(token, url, 20)
        wrong = [one for one in asked if one.status_code == 401 or "wrong keys" in one.text]
        let_in += len(asked) - len(wrong)
        return not wrong

    wait_until(is_known)
    return let_in


def predict_version(token: str, url: str) -> int:
    return int(ask_with(token, url)[0].json()["version"])


@pytest.mark.cluster
def test_replicas_share_a_keys_limit_and_all_is_in_the_bucket(
    store: Store, guarded: str, wait_until: Wait
) -> None:
    assert httpx.post(guarded, json=INSTANCES).status_code == 401
    assert httpx.get(httpx.URL(guarded).join("/healthz")).status_code == 200
    rate = 5
    limited, key = keys.create(store, "ana", limits=Limits(requests_per_second=rate))
    free, other = keys.create(store, "bob")
    for token in (limited, free):
        await_known(token, guarded, wait_until)
    began = time.monotonic()
    limited_responses = ask_with(limited, guarded, 200)
    seconds = time.monotonic() - began
    found = count_statuses(limited_responses)
    assert set(found) == {200, 429}
    lease = max(1.0, rate * LEASE_SECONDS)
    assert found[200] <= rate + rate * seconds + 2 * lease
    waits = [one.headers["retry-after"] for one in limited_responses if one.status_code == 429]
    assert set(waits) == {"1"}
    assert count_statuses(ask_with(free, guarded, 100)) == {200: 100}
    wait_until(lambda: usage.summarise(store, "key").get(other.id, Sum()).requests > 100)
    sums = usage.summarise(store, "key")
    assert sums[key.id].errors >= found[429]
    assert sums[other.id].rows == len(PIXELS) * (sums[other.id].requests - sums[other.id].errors)

    keys.revoke(store, other.id)
    refused = {401, 429}  # so many wrong keys at once are one address too many
    wait_until(lambda: set(count_statuses(ask_with(free, guarded, 20))) <= refused, 60)


@pytest.mark.cluster
def test_replicas_compute_a_repeated_request_once(
    store: Store, guarded: str, wait_until: Wait
) -> None:
    token, key = keys.create(store, "eve")
    known = await_known(token, guarded, wait_until)
    named = {**bearer(token), "idempotency-key": "order-1"}

    def ask(number: int) -> httpx.Response:
        return httpx.post(guarded, json=INSTANCES, headers=named, timeout=30)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(16)))
    assert Counter(answer.status_code for answer in answers) == {200: 16}
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 15
    other = {"instances": PIXELS[:1].tolist()}
    assert httpx.post(guarded, json=other, headers=named).status_code == 422

    def find_sum() -> Sum:
        return usage.summarise(store, "key").get(key.id, Sum())

    wait_until(lambda: find_sum().requests >= known + 17)
    used = find_sum()
    assert used.rows == len(PIXELS) * (used.requests - used.errors - 15)


@pytest.mark.cluster
@pytest.mark.faults
def test_neither_a_killed_office_nor_a_redeploy_loses_a_request_or_its_record(
    store: Store, guarded: str, wait_until: Wait
) -> None:
    token, key = keys.create(store, "ana", limits=Limits(requests_per_second=1000))
    before = await_known(token, guarded, wait_until)

    def count_recorded() -> int:
        return usage.summarise(store, "key").get(key.id, Sum()).requests

    wait_until(lambda: count_recorded() >= before)
    (office,) = (
        actor
        for actor in list_actors(detail=True)
        if actor.class_name == "Clerk" and actor.state == "ALIVE" and store.uri in actor.name
    )
    psutil.Process(office.pid).kill()
    assert count_statuses(ask_with(token, guarded, 200)) == {200: 200}
    wait_until(lambda: count_recorded() >= before + 200, 60)
    assert count_statuses(ask_with(token, guarded, 50)) == {200: 50}
    deploy(make_spec(store.uri, version=predict_version(token, guarded) % 2 + 1, auth=True))
    wait_until(lambda: count_recorded() >= before + 251, 60)
    assert count_recorded() == before + 251


@pytest.mark.cluster
def test_a_language_model_writes_over_http_what_it_writes_alone_and_is_charged_by_token(
    cluster: Cluster, store: Store, digits: str, wait_until: Wait
) -> None:
    store_tokenizer(store, writing.TOKENIZER)
    writing.publish(store, writing.NETWORKS["tied"].state_dict())
    token, key = keys.create(store, "ana", models=("rays",))
    before = read_table(store).models["digits"].number
    url = deploy(make_spec(store.uri, "rays", auth=True))
    assert url == f"{cluster.edge_url}/v1/completions"
    client = OpenAI(api_key=token, base_url=url.removesuffix("/completions"))
    prompt = "a field of mirrors"
    ids = tuple(parse_tokenizer(writing.TOKENIZER, "the tests").encode(prompt).ids)
    (alone,) = writing.make_engine("tied").generate([Ask(ids, 6)])
    asked: Any = {"model": "rays", "prompt": prompt, "max_tokens": 6, "temperature": 0}
    wait_until(lambda: httpx.get(f"{client.base_url}models", headers=bearer(token)).is_success)
    whole = client.completions.create(**asked)
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), len(alone))
    pieces = [piece.choices[0].text for piece in client.completions.create(**asked, stream=True)]
    assert "".join(pieces) == whole.choices[0].text
    with pytest.raises(PermissionDeniedError):
        client.completions.create(**asked | {"model": "digits"})
    wait_until(
        lambda: usage.summarise(store, "key").get(key.id, Sum()).tokens_out == 2 * len(alone)
    )
    deploy(make_spec(store.uri, version=before))


@pytest.mark.cluster
@pytest.mark.faults
def test_a_vllm_writes_for_its_replica_and_when_it_dies_both_are_replaced(
    cluster: Cluster, store: Store, digits: str, tmp_path: Path, wait_until: Wait
) -> None:
    program = tmp_path / "vllm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {STANDIN} "$@"\n')
    program.chmod(0o755)
    store_tokenizer(store, writing.TOKENIZER)
    writing.publish(store, writing.NETWORKS["tied"].state_dict())
    before = read_table(store).models["digits"].number
    vllm = {"program": str(program), "dtype": "float32"}
    url = deploy(make_spec(store.uri, "rays", engine="vllm", vllm=vllm))
    (alone,) = writing.make_engine("tied").generate([Ask((5, 6), 6, sampling=Sampling(0.0))])
    body = {"model": "rays", "prompt": [5, 6], "max_tokens": 6, "temperature": 0, "logprobs": 0}
    told = httpx.post(url, json=body, timeout=30).json()
    spell = parse_tokenizer(writing.TOKENIZER, "the tests").decode
    assert told["choices"][0]["logprobs"]["tokens"] == [spell([token]) for token in alone]
    first = find_standins()
    psutil.Process(*first).kill()
    wait_until(lambda: find_standins() not in (first, set()), 120)
    wait_until(lambda: httpx.post(url, json=body, timeout=30).is_success, 120)
    deploy(make_spec(store.uri, version=before))
    wait_until(lambda: not find_standins(), 60)


def find_standins() -> set[int]:
    return {
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if str(STANDIN) in (process.info["cmdline"] or ())
    }


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@pytest.mark.cluster
def test_what_is_served_already_is_left_as_it_is(
    store: Store, digits: str, serve_client: ServeSubmissionClient
) -> None:
    version = predict_online(digits)[0]
    deploy(make_spec(store.uri, version=version))
    before = find_application(serve_client)["last_deployed_time_s"], list_replicas(serve_client)
    deploy(make_spec(store.uri, version=version))
    after = find_application(serve_client)["last_deployed_time_s"], list_replicas(serve_client)
    assert after == before


@pytest.mark.cluster
@pytest.mark.faults
def test_a_rollback_serves_the_version_before_and_another_one_goes_forth_again(
    store: Store, digits: str
) -> None:
    old, new = predict_online(digits)[0], publish(store, 400).number
    deploy(make_spec(store.uri, version=new))
    with steady_load(digits) as answered:
        assert rollback(store, "digits") == f"digits:{old}"
        assert predict_online(digits)[0] == old
        assert rollback(store, "digits") == f"digits:{new}"
        assert predict_online(digits)[0] == new
    assert set(answered) == {(200, old), (200, new)}
    with pytest.raises(HeliostatError, match="nobody is not served, but digits"):
        rollback(store, "nobody")


CANARY = {"share": 0.3, "min_requests": 60, "max_latency_ratio": 100, "timeout_s": 60}


@pytest.mark.cluster
def test_a_canary_that_is_as_good_takes_over_without_a_lost_request(
    store: Store, digits: str, serve_client: ServeSubmissionClient, wait_until: Wait
) -> None:
    old, new = predict_online(digits)[0], publish(store, 500)
    with steady_load(digits) as answered:
        deploy(make_spec(store.uri, version=new.number, candidate=CANARY))
        assert predict_online(digits)[0] == new.number
    assert set(answered) == {(200, old), (200, new.number)}
    placed = read_table(store).models["digits"]
    assert (placed.number, placed.previous, placed.candidate) == (new.number, (old,), None)
    wait_until(lambda: list(serve_client.get_serve_details()["applications"]) == [APPLICATION], 60)


@pytest.mark.cluster
@pytest.mark.faults
def test_who_leaves_the_stream_of_a_canary_ends_it_and_is_charged_until_then(
    store: Store, digits: str, wait_until: Wait
) -> None:
    store_tokenizer(store, writing.TOKENIZER)
    weights = writing.NETWORKS["tied"].state_dict()
    served, better = (writing.publish(store, weights, run) for run in ("run-1", "run-2"))
    token, key = keys.create(store, "eve", models=("rays",))
    before = read_table(store).models["digits"].number
    url = deploy(make_spec(store.uri, "rays", version=served.number, auth=True))
    terms = {"share": 1.0, "min_requests": 200, "max_latency_ratio": 1e6, "timeout_s": 120}
    asked = {"model": "rays", "prompt": "a field", "ignore_eos": True}

    def find_made() -> list[int]:
        """The tokens made in each request that the candidate has got."""
        rows = (row for _, table in usage._read_parts(store, None) for row in table.to_pylist())
        wanted = key.id, better.number
        return [row["tokens_out"] for row in rows if (row["key"], row["version"]) == wanted]

    def finish() -> None:
        body = asked | {"max_tokens": 1}
        assert httpx.post(url, json=body, headers=bearer(token)).is_success

    def is_tried() -> bool:
        finish()
        time.sleep(1)
        return bool(find_made())

    def leave() -> None:
        body = asked | {"max_tokens": 40, "stream": True, "n": 64}
        with httpx.stream("POST", url, json=body, headers=bearer(token)) as answer:
            next(answer.iter_lines())

    candidate = {"version": better.number, "auth": True, "candidate": terms}
    with ThreadPoolExecutor(1) as pool:
        deployed = pool.submit(deploy, make_spec(store.uri, "rays", **candidate))
        wait_until(is_tried, 120)
        leave()
        wait_until(lambda: max(find_made()) > 1, 30)
        assert max(find_made()) < 64 * 40
        while not deployed.done():
            finish()
        deployed.result()
    deploy(make_spec(store.uri, version=before))


@pytest.mark.cluster
@pytest.mark.faults
def test_a_shadow_whose_answers_differ_is_taken_back_and_has_answered_nobody(
    store: Store, digits: str
) -> None:
    version, other = predict_online(digits)[0], publish(store, 600)
    terms = {"mode": "shadow", "share": 1.0, "max_difference": 1e-6, "timeout_s": 60}
    with steady_load(digits) as answered, pytest.raises(HeliostatError) as error:
        deploy(make_spec(store.uri, version=other.number, candidate=terms))
    told = f"{other.ref} was taken back, digits:{version} is still served: "
    assert str(error.value).startswith(told)
    assert "answers differ, by up to" in str(error.value)
    assert set(answered) == {(200, version)}
    assert read_table(store).models["digits"].candidate is None


@pytest.mark.cluster
@pytest.mark.faults
def test_two_deploys_at_once_end_in_one_state(store: Store, digits: str) -> None:
    specs = [make_spec(store.uri, version=2), make_spec(store.uri, "letters")]
    publish(store, 4, "letters")
    with ThreadPoolExecutor(2) as pool:
        urls = list(pool.map(deploy, specs))
    numbers = {name: placed.number for name, placed in read_table(store).models.items()}
    assert (numbers["digits"], numbers["letters"]) == (2, 1)
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

    def put(name: str) -> Table:
        return change_table(store, lambda table: place(table, name, Placement(number=1)))

    with ThreadPoolExecutor(len(names)) as pool:
        before = list(pool.map(put, names))
    assert sorted(read_table(store).models) == sorted(names)
    assert sorted(len(table.models) for table in before) == list(range(len(names)))
