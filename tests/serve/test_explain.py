"""Explanations over HTTP: every kind of model, and nothing that is asked wrongly is a failure."""

import asyncio
import json
import threading
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heliostat.serve.explain import EXPLAIN_POOL, MAX_WAITING
from serving import EVERY, LIMITS, ROWS, Client, check_error, make_app


@pytest.fixture(scope="module")
def client() -> Client:
    return Client(make_app(EVERY, LIMITS))


def ask(client: Client, name: str, **document: Any) -> Any:
    return client.post(f"/v1/models/{name}:explain", json=document)


def test_every_instance_has_its_explanation(client: Client) -> None:
    answer = ask(client, "people", **ROWS, budget_ms=300).json()
    assert (answer["model"], answer["version"], answer["budget_ms"]) == ("people", 3, 300)
    predicted = client.post("/v1/models/people:predict", json=ROWS).json()["predictions"]
    assert [one["target"] for one in answer["explanations"]] == [one["class"] for one in predicted]
    for one in answer["explanations"]:
        assert set(one["attributions"]) == {"age", "job"}


def test_a_budget_is_never_longer_than_a_request(client: Client) -> None:
    answer = ask(client, "people", **ROWS, budget_ms=600_000).json()
    assert answer["budget_ms"] == 1000 * LIMITS.request_timeout_s * 0.8


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({}, "instances"),
        ({"instances": []}, "instances"),
        ({"instances": ROWS["instances"] * 10}, "instances"),
        ({**ROWS, "budget_ms": 0}, "budget_ms"),
        ({**ROWS, "budget_ms": "1"}, "budget_ms"),
        ({**ROWS, "window": -1}, "window"),
        ({**ROWS, "method": "magic"}, "method"),
        ({**ROWS, "other": 1}, "other"),
        ({**ROWS, "target": 1}, "target"),
        ({**ROWS, "target": "maybe"}, "instances[0]"),
        ({**ROWS, "method": "occlusion"}, "instances[0]"),
        ({"instances": [{"age": "x"}]}, "instances[0].age"),
    ],
)
def test_what_cannot_be_explained_is_422_and_names_the_field(
    client: Client, document: dict[str, Any], field: str
) -> None:
    response = ask(client, "people", **document)
    assert response.status_code == 422, response.text
    assert check_error(response)["field"] == field


def test_another_content_type_is_415_and_another_model_404(client: Client) -> None:
    assert client.post("/v1/models/people:explain", content=b"x").status_code == 415
    assert ask(client, "other", **ROWS).status_code == 404


def test_predictions_wait_for_no_explanation_and_too_many_of_these_are_429() -> None:
    app = make_app(EVERY, replace(LIMITS, max_requests=64))
    released = threading.Event()
    blocked = EXPLAIN_POOL.submit(released.wait)

    async def run() -> tuple[list[int], int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as http:
            path = "/v1/models/people"
            asked = [
                asyncio.create_task(http.post(f"{path}:explain", json=ROWS))
                for _ in range(MAX_WAITING + 1)
            ]
            done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            predicted = await http.post(f"{path}:predict", json=ROWS)
            assert [task.result().status_code for task in done] == [429]
            released.set()
            return [one.status_code for one in await asyncio.gather(*asked)], predicted.status_code

    try:
        statuses, predicted = asyncio.run(run())
    finally:
        released.set()
    assert blocked.result()
    assert sorted(statuses) == [200] * MAX_WAITING + [429]
    assert predicted == 200


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner)
    ),
    max_leaves=8,
)
documents = st.fixed_dictionaries(
    {},
    optional={
        "instances": st.one_of(st.just(ROWS["instances"][:1]), values),
        "target": st.one_of(st.sampled_from(["no", "yes"]), values),
        "method": st.one_of(st.sampled_from(["occlusion", "integrated_gradients"]), values),
        "budget_ms": st.one_of(st.just(1), values),
        "window": values,
    },
)


@given(name=st.sampled_from(["people", "shapes", "sounds", "mails"]), document=documents)
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
def test_no_document_makes_the_server_fail(
    client: Client, name: str, document: dict[str, Any]
) -> None:
    body = json.dumps(document).encode()
    headers = {"content-type": "application/json"}
    response = client.post(f"/v1/models/{name}:explain", content=body, headers=headers)
    assert response.status_code < 500, response.text
