"""Small models of several kinds, an application over them and a client of it, in one process."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp

from drafting import version
from heliostat.data.features import (
    CategoryColumn,
    Features,
    IdColumn,
    ImageFeatures,
    NumericColumn,
    SeriesFeatures,
    TableFeatures,
    TextFeatures,
    input_of,
)
from heliostat.data.tokens import learn_tokenizer, parse_tokenizer
from heliostat.evaluate import Predictor
from heliostat.models import build, task_of
from heliostat.serve.app import build_app
from heliostat.serve.door import Limits
from heliostat.serve.shelf import Served, Shelf
from heliostat.signature import Classes, Numbers, Output, Signature
from heliostat.spec import (
    CnnSpec,
    EncoderSpec,
    MlpSpec,
    ModelSpec,
    RecsysSpec,
    RnnSpec,
)

LABELS = ("no", "yes", "perhaps")
OUTPUT = Classes(LABELS)
IMAGE = ImageFeatures(4, 4, 1, (0.5,), (0.25,))
TABLE = TableFeatures(
    (NumericColumn("age", 40.0, 10.0, True), CategoryColumn("job", ("cook", "smith")))
)
LIMITS = Limits(max_body_bytes=20_000, max_requests=4, request_timeout_s=5)
IMAGES = {"instances": [[[0, 64, 128, 255]] * 4, [[255] * 4] * 4]}
ROWS = {"instances": [{"age": 41, "job": "cook"}, {"age": None, "job": "pilot"}]}


MLP = MlpSpec(kind="mlp", hidden=(8,))
TOKENIZER = learn_tokenizer(["the quick brown fox jumps over the lazy dog"] * 4, 300)


def serve(
    name: str,
    features: Features,
    number: int = 3,
    model: ModelSpec = MLP,
    output: Output = OUTPUT,
) -> Served:
    torch.manual_seed(0)
    signature = Signature(input_of(features), output)
    network, task = build(model, signature).eval(), task_of(model, signature)
    is_text = isinstance(features, TextFeatures)
    tokenizer = parse_tokenizer(TOKENIZER, name) if is_text else None
    predictor = Predictor(network, task, features, output, tokenizer)
    return Served(version(name, number, features, output), predictor)


MODELS = {"shapes": serve("shapes", IMAGE), "people": serve("people", TABLE)}

COLOUR = ImageFeatures(8, 8, 3, (0.5,) * 3, (0.25,) * 3)
SERIES = SeriesFeatures(6, 2, (0.5, 1.0), (1.0, 2.0))
TEXTS = TextFeatures(16, 300, "0" * 64)
RATINGS = TableFeatures(
    (
        IdColumn("user", ("1", "2")),
        IdColumn("item", ("a", "b")),
        NumericColumn("age", 40, 10, False),
    )
)
PRICES = Numbers(("low", "high"), (10.0, 20.0), (2.0, 4.0))
# One of every kind of features, family of models and kind of output.
EVERY = {
    **MODELS,
    "photos": serve("photos", COLOUR, model=CnnSpec(kind="cnn", channels=(4, 8), hidden=(8,))),
    "sounds": serve("sounds", SERIES, model=RnnSpec(kind="rnn", width=6)),
    "mails": serve("mails", TEXTS, model=EncoderSpec(kind="encoder", layers=1, width=8, heads=2)),
    "tweets": serve("tweets", TEXTS, model=RnnSpec(kind="rnn", width=6, cell="lstm")),
    "ratings": serve("ratings", RATINGS, model=RecsysSpec(kind="recsys", embedding=4, hidden=(8,))),
    "signs": serve(
        "signs",
        TABLE,
        model=MlpSpec(kind="mlp", hidden=(8,), loss="bce"),
        output=Classes(("-", "+")),
    ),
    "prices": serve("prices", TABLE, output=PRICES),
}


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


@contextmanager
def listen(app: Starlette) -> Iterator[str]:
    """The application behind a real HTTP server; its host and port."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as bound:
        thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
        thread.start()
        try:
            yield "{}:{}".format(*bound.getsockname())
        finally:
            server.should_exit = True
            thread.join()


def check_error(response: httpx.Response) -> dict[str, Any]:
    """Every error has the one shape, below /v2 a flat one, and the request id of its header."""
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()
    if response.request.url.path.startswith("/v2/"):
        error["message"] = error.pop("error")
    else:
        assert set(error) == {"error"}
        error = error["error"]
    assert set(error) == {"type", "message", "field", "request_id"}
    assert error["request_id"] == response.headers["x-request-id"]
    return error
