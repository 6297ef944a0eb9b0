"""While a body that takes long to read is read, who asks something short is answered."""

import asyncio
import base64
import io
import json
import threading
from dataclasses import replace
from pydoc import locate
from typing import Any, cast

import httpx
import pytest
from PIL import Image
from starlette.types import ASGIApp

from heliostat.serve.app import build_app
from heliostat.serve.batcher import Batcher, Pace
from heliostat.serve.door import Limits
from heliostat.serve.reading import THREADS
from heliostat.serve.shelf import COMPUTE_POOL, Loaded, Shelf
from serving import EVERY, ROWS
from writing import make_language

LIMITS = Limits(max_body_bytes=500_000, max_requests=16, request_timeout_s=60)
PIXELS = "heliostat.data.pixels.open_image"
VALUES = "heliostat.serve.protocol.parse_instances"
TENSORS = "heliostat.serve.v2.parse_question"
WORDS = "heliostat.evaluate.encode_texts"
PROMPTS = "heliostat.serve.language.Language.encode"

PNG, JSON = "image/png", "application/json"
LONG = "the quick brown fox " * 300


def encode_png() -> bytes:
    file = io.BytesIO()
    Image.new("1", (64, 64)).save(file, "PNG")
    return file.getvalue()


def predict(name: str, instances: list[Any]) -> tuple[str, str, bytes]:
    return f"/v1/models/{name}:predict", JSON, json.dumps({"instances": instances}).encode()


def infer(model: str, **tensor: Any) -> tuple[str, str, bytes]:
    shape = [len(tensor["data"]), *tensor.pop("shape", ())]
    document = {"inputs": [{**tensor, "shape": shape}]}
    return f"/v2/models/{model}/infer", JSON, json.dumps(document).encode()


def complete(*prompts: str) -> tuple[str, str, bytes]:
    document = {"model": "rays", "prompt": prompts, "max_tokens": 1}
    return "/v1/completions", JSON, json.dumps(document).encode()


FILE = {"b64": base64.b64encode(encode_png()).decode()}
TEXTS = {"name": "text", "datatype": "BYTES"}
GREY = {"name": "image", "datatype": "UINT8", "shape": (4, 4, 1)}
SHORT = predict("people", ROWS["instances"])

LONG_ONES = {
    "an image": (PIXELS, ("/v1/models/photos:predict", PNG, encode_png())),
    "an image in JSON": (PIXELS, predict("photos", [FILE])),
    "an image to explain": (
        PIXELS,
        ("/v1/models/photos:explain", JSON, json.dumps({"instances": [FILE]}).encode()),
    ),
    "many rows": (VALUES, predict("people", ROWS["instances"] * 500)),
    "a long text": (WORDS, predict("mails", [LONG])),
    "a long text as a tensor": (WORDS, infer("mails", **TEXTS, data=[LONG])),
    "many numbers": (TENSORS, infer("shapes", **GREY, data=[[[[0]] * 4] * 4] * 1000)),
    "many prompts": (PROMPTS, complete(*["a field of mirrors turns many rays to one"] * 128)),
}
SHORT_ONES = {
    "rows": (VALUES, SHORT),
    "a text": (WORDS, predict("mails", ["a text"])),
    "numbers": (TENSORS, infer("shapes", **GREY, data=[[[[0]] * 4] * 4])),
    "a prompt": (PROMPTS, complete("a field of mirrors")),
}


def make_app() -> ASGIApp:
    """Every model; that of texts is known to compute so fast that no thread is worth it."""
    pace = Pace(0.0)
    pace.record(1, 0.0)
    mails = replace(EVERY["mails"])
    mails.__dict__["batcher"] = Batcher(mails.compute, COMPUTE_POOL, pace=pace)
    models: dict[str, Loaded] = {**EVERY, "mails": mails, "rays": make_language(max_waiting=256)}
    versions = {name: [loaded.version] for name, loaded in models.items()}
    return build_app(Shelf(versions, lambda v: models[v.name], max_bytes=2**30), LIMITS)


class Watched:
    """Where what stands at `place` is called, and how often at once; each call waits for `free`."""

    def __init__(self, patch: pytest.MonkeyPatch, place: str) -> None:
        self.in_loop, self.inside, self.most = list[bool](), 0, 0
        self.free, self.was_freed = threading.Event(), list[bool]()
        act = cast(Any, locate(place))

        def watched(*arguments: Any, **options: Any) -> Any:
            self.in_loop.append(threading.current_thread() is threading.main_thread())
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.was_freed.append(self.free.wait(5))
            self.inside -= 1
            return act(*arguments, **options)

        patch.setattr(place, watched)


async def post(http: httpx.AsyncClient, path: str, kind: str, body: bytes) -> int:
    headers = {"content-type": kind}
    return (await http.post(path, content=body, headers=headers)).status_code


def connect(app: ASGIApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app")


@pytest.mark.parametrize(
    ("place", "asked", "in_loop"),
    [
        *(pytest.param(*one, False, id=name) for name, one in LONG_ONES.items()),
        *(pytest.param(*one, True, id=name) for name, one in SHORT_ONES.items()),
    ],
)
def test_what_is_long_is_read_in_a_thread_and_what_is_short_where_it_is(
    monkeypatch: pytest.MonkeyPatch, place: str, asked: tuple[str, str, bytes], in_loop: bool
) -> None:
    async def run() -> int:
        async with connect(make_app()) as http:
            return await post(http, *asked)

    watched = Watched(monkeypatch, place)
    watched.free.set()
    assert asyncio.run(run()) == 200
    assert set(watched.in_loop) == {in_loop}


def test_while_images_are_decoded_others_are_answered_and_few_are_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> list[int]:
        async with connect(make_app()) as http:
            asked = LONG_ONES["an image"][1]
            images = [asyncio.create_task(post(http, *asked)) for _ in range(8)]
            others = [await post(http, *SHORT), (await http.get("/healthz")).status_code]
            watched.free.set()
            return [*others, *await asyncio.gather(*images)]

    watched = Watched(monkeypatch, PIXELS)
    assert asyncio.run(run()) == [200] * 10
    assert all(watched.was_freed)
    assert watched.most <= THREADS


def test_an_image_whose_client_left_while_it_waited_is_not_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        async with connect(make_app()) as http:
            asked = LONG_ONES["an image"][1]
            images = [asyncio.create_task(post(http, *asked)) for _ in range(8)]
            async with asyncio.timeout(10):
                while watched.inside < THREADS:
                    await asyncio.sleep(0.001)
            for image in images:
                image.cancel()
            await asyncio.gather(*images, return_exceptions=True)
            watched.free.set()
            assert await post(http, *asked) == 200

    watched = Watched(monkeypatch, PIXELS)
    asyncio.run(run())
    assert len(watched.in_loop) == THREADS + 1
