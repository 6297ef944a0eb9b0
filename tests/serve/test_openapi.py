"""The document of the routes: valid, whole, and its examples are answered."""

from typing import Any

import captum.attr  # noqa: F401  # else the first explanation imports it, in a request's time
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.routing import Route

from serving import EVERY, LIMITS, Client, make_app

APP = make_app(EVERY, LIMITS)
CLIENT = Client(APP)
DOCUMENT: dict[str, Any] = CLIENT.get("/openapi.json").json()
EXAMPLES = [
    (path, name)
    for path, item in DOCUMENT["paths"].items()
    for name in item.get("post", {})
    .get("requestBody", {})
    .get("content", {})
    .get("application/json", {})
    .get("examples", {})
]


def test_it_is_valid_openapi() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()


def test_every_route_is_described_and_no_other() -> None:
    routes = {
        (route.path_format, method.lower())
        for route in APP.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    described = {(path, method) for path, item in DOCUMENT["paths"].items() for method in item}
    assert described == routes
    assert all(isinstance(route, Route) for route in APP.routes)


def test_every_model_has_an_example_of_every_question() -> None:
    asked = {path for path, _ in EXAMPLES}
    assert {(path, name) for path in asked for name in EVERY} == set(EXAMPLES)
    assert len(asked) == 4


@pytest.mark.parametrize(("path", "name"), EXAMPLES)
def test_an_example_is_answered(path: str, name: str) -> None:
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    example = content["examples"][name]["value"]
    response = CLIENT.post(path.format(name=name, number=3), json=example)
    assert response.status_code == 200, response.text
    answer = DOCUMENT["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]
    assert set(answer["schema"]["required"]) <= set(response.json())
