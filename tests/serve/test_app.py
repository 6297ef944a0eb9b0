"""The HTTP application without Ray: one answer for every request, whatever it holds."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heliostat.evaluate import predict
from heliostat.serve.door import Limits
from heliostat.serve.shelf import Served
from serving import IMAGES, LABELS, LIMITS, MODELS, ROWS, Client, check_error, make_app


def change(served: Served, network: torch.nn.Module) -> Served:
    return replace(served, predictor=replace(served.predictor, network=network))


@pytest.fixture(scope="module")
def client() -> Client:
    return Client(make_app(MODELS, LIMITS))


@pytest.mark.parametrize(("name", "document"), [("shapes", IMAGES), ("people", ROWS)])
def test_http_answers_equal_the_offline_predictions(
    client: Client, name: str, document: dict[str, Any]
) -> None:
    columns = {
        "shapes": {"image": np.array(IMAGES["instances"], dtype=np.uint8)[..., np.newaxis]},
        "people": {
            "numbers": np.array([[41], [np.nan]]),
            "x.job": np.array(["cook", "pilot"], object),
        },
    }[name]
    answer = client.post(f"/v1/models/{name}:predict", json=document).json()
    served = [list(p["probabilities"].values()) for p in answer["predictions"]]
    offline = predict(MODELS[name].predictor, columns)
    assert np.array_equal(np.array(served, dtype=np.float32), offline)
    assert [p["class"] for p in answer["predictions"]] == [LABELS[i] for i in offline.argmax(1)]
    assert (answer["model"], answer["version"]) == (name, 3)


def test_health_and_the_list_of_models(client: Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/v1/models").json()["models"] == [
        {"name": name, "version": 3, "classes": list(LABELS)} for name in ("shapes", "people")
    ]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json/", 404),
        ("GET", "/healthz/", 404),
        ("GET", "//v1/models", 404),
        ("POST", "/healthz", 405),
        ("GET", "/v1/models/shapes:predict", 405),
        ("POST", "/v1/models/shapes", 405),
        ("GET", "/v1/models/unknown", 404),
        ("GET", "/v1/models/shapes/x", 404),
        ("POST", "/v1/models/unknown:predict", 404),
        ("POST", "/v1/models/..%2fshapes:predict", 404),
        ("POST", "/v1/models/%00:predict", 404),
        ("POST", "/v1/models/" + "x" * 5000 + ":predict", 404),
    ],
)
def test_unknown_routes_and_models(client: Client, method: str, path: str, status: int) -> None:
    response = client.request(method, path, json=None if method == "GET" else IMAGES)
    assert response.status_code == status
    check_error(response)


def test_the_field_is_named(client: Client) -> None:
    for age in ("41", True, [41], 1e300):
        rows = {"instances": [{"age": 41}, {"age": age}]}
        response = client.post("/v1/models/people:predict", json=rows)
        assert response.status_code == 422
        assert check_error(response)["field"] == "instances[1].age"


def test_an_overflow_inside_the_model_is_the_fault_of_the_row() -> None:
    class Overflowing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full((len(x), len(LABELS)), torch.inf)

    overflowing = change(MODELS["people"], Overflowing())
    response = Client(make_app({"people": overflowing}, LIMITS)).post(
        "/v1/models/people:predict", json=ROWS
    )
    assert response.status_code == 422
    assert check_error(response)["field"] == "instances[0]"


def test_a_request_id_is_never_the_clients(client: Client) -> None:
    ids = {
        client.get("/healthz", headers={"x-request-id": "mine"}).headers["x-request-id"]
        for _ in range(3)
    }
    assert len(ids) == 3
    assert all(len(bytes.fromhex(request_id)) == 16 for request_id in ids)


def test_an_answer_has_the_id_that_the_edge_gave(client: Client) -> None:
    given = "0123456789abcdef" * 2
    for path in ("/healthz", "/nothing"):
        response = client.get(path, headers={"x-request-id": given})
        assert response.headers["x-request-id"] == given
    assert check_error(response)["request_id"] == given


class Body:
    """The receiving side of a request whose body comes in chunks, and how many were taken."""

    def __init__(self, chunk: bytes) -> None:
        self.chunk, self.taken = chunk, 0

    async def __call__(self) -> dict[str, Any]:
        self.taken += 1
        return {"type": "http.request", "body": self.chunk, "more_body": True}


class Stalled:
    """The receiving side of a request whose body never comes."""

    async def __call__(self) -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError


async def post(app: Any, receive: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """One request by hand: no client library, no buffering."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    path = "/v1/models/shapes:predict"
    fields = {"content-type": "application/json", **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


@pytest.mark.parametrize("declared", [None, "3", "60000000", "9" * 5000, "x"])
def test_an_endless_body_is_413_as_soon_as_it_is_too_large(declared: str | None) -> None:
    body = Body(b"[" * 4096)
    headers = {"content-length": declared} if declared else {}
    status, answer = asyncio.run(post(make_app(MODELS, LIMITS), body, headers))
    assert (status, answer["error"]["type"]) == (413, "body_too_large")
    assert body.taken == LIMITS.max_body_bytes // 4096 + 1


def test_a_body_that_never_comes_is_408() -> None:
    app = make_app(MODELS, Limits(max_body_bytes=10, max_requests=1, request_timeout_s=0.05))
    status, answer = asyncio.run(post(app, Stalled()))
    assert (status, answer["error"]["type"]) == (408, "timeout")


@pytest.mark.parametrize(("limit_s", "wanted"), [(60, "0.05"), (0.05, "1000"), (0.05, "60.5")])
def test_a_client_may_only_shorten_the_time(limit_s: float, wanted: str) -> None:
    app = make_app(MODELS, Limits(max_body_bytes=10, max_requests=1, request_timeout_s=limit_s))
    status, answer = asyncio.run(post(app, Stalled(), {"x-timeout-seconds": wanted}))
    assert (status, answer["error"]["message"]) == (408, "no answer within 0.05 s")


@pytest.mark.parametrize(
    "wanted", ["0", "0.0", "-1", "nan", "inf", "1e9", "", "1s", "٣", "9" * 400]
)
def test_a_timeout_that_is_none_is_refused(client: Client, wanted: str) -> None:
    headers = {"x-timeout-seconds": wanted.encode()}
    response = client.post("/v1/models/shapes:predict", json=IMAGES, headers=headers)
    assert response.status_code == 400
    assert check_error(response)["field"] == "x-timeout-seconds"


def test_a_full_house_refuses_the_next_request_at_once_and_opens_again() -> None:
    app = make_app(MODELS, Limits(max_body_bytes=10, max_requests=2, request_timeout_s=60))

    async def run() -> list[int]:
        waiting = [asyncio.create_task(post(app, Stalled())) for _ in range(2)]
        await asyncio.sleep(0)
        refused, _ = await post(app, Stalled())
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        admitted, _ = await post(app, Body(b"x" * 11))
        return [refused, admitted]

    assert asyncio.run(run()) == [429, 413]


def test_a_bug_is_500_and_tells_nothing() -> None:
    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("secret")

    broken = change(MODELS["shapes"], Broken())
    client = Client(make_app({"shapes": broken}, LIMITS))
    response = client.post("/v1/models/shapes:predict", json=IMAGES)
    assert response.status_code == 500
    assert "secret" not in str(check_error(response))


numbers = st.one_of(st.integers(), st.floats(), st.integers(0, 255))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8)),
    lambda children: st.one_of(
        st.lists(children, max_size=5),
        st.dictionaries(st.sampled_from(["age", "job", "b64", "x", ""]), children, max_size=3),
    ),
    max_leaves=24,
)
images = st.lists(st.lists(numbers, min_size=3, max_size=5), min_size=3, max_size=5)
rows = st.fixed_dictionaries({}, optional={"age": values, "job": values, "x": values})
documents = st.one_of(
    values,
    st.dictionaries(st.sampled_from(["instances", "x"]), values),
    st.fixed_dictionaries({"instances": st.lists(st.one_of(images, rows, values), max_size=4)}),
)
texts = documents.map(lambda document: json.dumps(document).encode())
bodies = st.one_of(
    texts,
    st.binary(max_size=64),
    st.tuples(texts, st.integers(0, 200), st.binary(max_size=3)).map(
        lambda cut: cut[0][: cut[1]] + cut[2] + cut[0][cut[1] :]
    ),
)
content_types = st.one_of(
    st.just("application/json"),
    st.sampled_from(["image/png", "image/jpeg", "application/json; charset=x", "", ";", "a/b"]),
)


def check_any_body_is_answered(client: Client, name: str, content_type: str, body: bytes) -> None:
    path = f"/v1/models/{name}:predict"
    response = client.post(path, content=body, headers={"content-type": content_type})
    if response.status_code == 200:
        assert len(response.json()["predictions"]) >= 1
    else:
        assert 400 <= response.status_code < 500, response.text
        check_error(response)


@given(name=st.sampled_from(["shapes", "people"]), content_type=content_types, body=bodies)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_body_makes_the_server_fail(
    client: Client, name: str, content_type: str, body: bytes
) -> None:
    check_any_body_is_answered(client, name, content_type, body)


@pytest.mark.faults
@given(name=st.sampled_from(["shapes", "people"]), content_type=content_types, body=bodies)
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_body_of_ten_thousand_makes_the_server_fail(
    client: Client, name: str, content_type: str, body: bytes
) -> None:
    check_any_body_is_answered(client, name, content_type, body)
    assert client.post("/v1/models/people:predict", json=ROWS).status_code == 200
