"""The HTTP application of a replica: loaded versions in, answers out; it runs without Ray too."""

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from heliostat import registry
from heliostat.errors import HeliostatError
from heliostat.evaluate import Predictor, load_predictor, predict
from heliostat.serve.protocol import (
    JSON_TYPE,
    Refusal,
    parse_body,
    render_error,
    render_predictions,
    zero_instance,
)
from heliostat.signature import Classes, Numbers
from heliostat.storage import Store

logger = logging.getLogger(__name__)

# One thread computes at a time, so the event loop stays free and batches do not fight for cores.
COMPUTE_THREADS = 1
RETRY_HEADERS = {429: {"retry-after": "1"}}


@dataclass(frozen=True)
class Limits:
    max_body_bytes: int
    max_requests: int
    request_timeout_s: float


@dataclass(frozen=True)
class Served:
    """One version, loaded."""

    version: registry.Version
    predictor: Predictor

    def predict(self, content_type: str, body: bytes) -> bytes:
        """The JSON answer to the body of a request.

        Raises:
            Refusal: what is wrong with the body.
        """
        columns = parse_body(self.predictor.features, content_type, body)
        values = predict(self.predictor, columns)
        version = self.version
        return render_predictions(version.name, version.number, self.predictor.output, values)


def load(store: Store, ref: str) -> Served:
    """Load a version and let it answer once.

    Raises:
        HeliostatError: the version is unknown, its weights are damaged, or it does not answer.
    """
    version = registry.resolve(store, ref)
    served = Served(version, load_predictor(store, version))
    instance = zero_instance(served.predictor.features)
    try:
        served.predict(JSON_TYPE, to_json({"instances": [instance]}))
    except Refusal as refusal:
        raise HeliostatError(f"{ref} does not answer a row of zeros: {refusal}") from refusal
    return served


def build_app(models: Mapping[str, Served], limits: Limits) -> FastAPI:
    """The routes over `models`, by name."""
    api = FastAPI(
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers=ERROR_HANDLERS,
    )
    pool = ThreadPoolExecutor(COMPUTE_THREADS, "predict")
    gate = Gate(limits.max_requests)

    @api.get("/healthz")
    async def healthz() -> Response:
        return reply(to_json({"status": "ok"}))

    @api.get("/v1/models")
    async def list_models() -> Response:
        return reply(to_json({"models": [describe(served) for served in models.values()]}))

    @api.post("/v1/models/{name}:predict")
    async def predict(name: str, request: Request) -> Response:
        served = models.get(name)
        if served is None:
            raise Refusal(404, "there is no such model")
        try:
            with gate:
                async with asyncio.timeout(limits.request_timeout_s):
                    body = await read_body(request, limits.max_body_bytes)
                    content_type = request.headers.get("content-type", "")
                    loop = asyncio.get_running_loop()
                    return reply(
                        await loop.run_in_executor(pool, served.predict, content_type, body)
                    )
        except TimeoutError as error:
            raise Refusal(408, f"no answer within {limits.request_timeout_s:g} s") from error

    return api


def describe(served: Served) -> dict[str, object]:
    version = served.version
    match served.predictor.output:
        case Classes(labels):
            predicts = {"classes": labels}
        case Numbers(names):
            predicts = {"numbers": names}
    return {"name": version.name, "version": version.number, **predicts}


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body; reading stops as soon as it is too large, whatever length was declared.

    Raises:
        Refusal: 413, the body has more than `max_bytes`.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise Refusal(413, f"the body has more than {max_bytes:,} bytes", "body")
    return bytes(body)


class Gate:
    """At most `limit` requests are inside at once, the next one is refused instead of waiting."""

    def __init__(self, limit: int) -> None:
        self.limit, self.inside = limit, 0

    def __enter__(self) -> None:
        if self.inside >= self.limit:
            raise Refusal(429, f"{self.limit} requests are waiting already, retry later")
        self.inside += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.inside -= 1


def reply(content: bytes) -> Response:
    return Response(content, media_type=JSON_TYPE, headers={"x-request-id": make_request_id()})


def fail(
    status: int,
    message: str,
    field: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    request_id = make_request_id()
    content = render_error(status, message, request_id, field)
    return Response(
        content, status, {**(headers or {}), "x-request-id": request_id}, media_type=JSON_TYPE
    )


def make_request_id() -> str:
    return secrets.token_hex(16)


async def on_refusal(request: Request, refusal: Refusal) -> Response:
    return fail(refusal.status, refusal.message, refusal.field, RETRY_HEADERS.get(refusal.status))


async def on_http_error(request: Request, error: HTTPException) -> Response:
    return fail(error.status_code, error.detail, headers=error.headers)


async def on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    return fail(400, "the connection closed before the body was complete")


async def on_bug(request: Request, error: Exception) -> Response:
    response = fail(500, "the server failed, its log has the reason under this request id")
    logger.error("request %s failed", response.headers["x-request-id"], exc_info=error)
    return response


ERROR_HANDLERS: dict[
    int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]
] = {
    Refusal: on_refusal,
    HTTPException: on_http_error,
    ClientDisconnect: on_disconnect,
    Exception: on_bug,
}
