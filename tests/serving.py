"""Small models of several kinds, an application over them and a client of it, in one process."""

import asyncio
from typing import Any

import httpx
import torch
from starlette.applications import Starlette
from starlette.types import ASGIApp

from heliostat.data.features import (
    CategoryColumn,
    Features,
    ImageFeatures,
    NumericColumn,
    TableFeatures,
    features_to_json,
    input_of,
)
from heliostat.evaluate import Predictor
from heliostat.models import build, task_of
from heliostat.registry import Version
from heliostat.serve.app import build_app
from heliostat.serve.door import Limits
from heliostat.serve.shelf import Served, Shelf
from heliostat.signature import Classes, Signature, output_to_json
from heliostat.spec import MlpSpec

LABELS = ("no", "yes", "perhaps")
OUTPUT = Classes(LABELS)
IMAGE = ImageFeatures(4, 4, 1, (0.5,), (0.25,))
TABLE = TableFeatures(
    (NumericColumn("age", 40.0, 10.0, True), CategoryColumn("job", ("cook", "smith")))
)
LIMITS = Limits(max_body_bytes=20_000, max_requests=4, request_timeout_s=5)
IMAGES = {"instances": [[[0, 64, 128, 255]] * 4, [[255] * 4] * 4]}
ROWS = {"instances": [{"age": 41, "job": "cook"}, {"age": None, "job": "pilot"}]}


def serve(name: str, features: Features, number: int = 3) -> Served:
    torch.manual_seed(0)
    version = Version(
        name=name,
        number=number,
        created="2026-01-01T00:00:00+00:00",
        output=output_to_json(OUTPUT),
        features=features_to_json(features),
        spec={},
        data_name=name,
        data_version="0" * 16,
        run="run",
        step=1,
        code="",
        metrics={},
        weights_sha256="0" * 64,
        weights_bytes=0,
    )
    model, signature = MlpSpec(kind="mlp", hidden=(8,)), Signature(input_of(features), OUTPUT)
    network = build(model, signature).eval()
    return Served(version, Predictor(network, task_of(model, signature), features, OUTPUT))


MODELS = {"shapes": serve("shapes", IMAGE), "people": serve("people", TABLE)}


def make_app(models: dict[str, Served], limits: Limits) -> Starlette:
    versions = {name: [served.version] for name, served in models.items()}
    shelf = Shelf(versions, lambda version: models[version.name], max_bytes=2**20)
    return build_app(shelf, limits)


class Client:
    """An HTTP client of an application in this process."""

    def __init__(self, app: ASGIApp) -> None:
        self.transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            async with httpx.AsyncClient(transport=self.transport, base_url="http://app") as http:
                return await http.request(method, path, **options)

        return asyncio.run(send())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)


def check_error(response: httpx.Response) -> dict[str, Any]:
    """Every error has the one shape, and the request id of its header."""
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"type", "message", "field", "request_id"}
    assert error["request_id"] == response.headers["x-request-id"]
    return error
