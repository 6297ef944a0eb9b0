"""Answers: JSON as it is, and every error in one shape with the id of its request."""

import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from heliostat.serve.identity import REQUEST_ID, find_request_id

logger = logging.getLogger(__name__)

JSON_TYPE = "application/json"
MAX_TEXT_CHARS = 400
NO_MODEL = "there is no such model"
ERROR_TYPES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    409: "conflict",
    413: "body_too_large",
    415: "unsupported_media_type",
    422: "invalid_value",
    429: "overloaded",
    500: "internal_error",
    503: "unavailable",
}
RETRY_HEADERS = {429: {"retry-after": "1"}, 503: {"retry-after": "1"}}


class Refusal(Exception):
    """A request that gets an error as its answer; `field` is the path of what is wrong in it."""

    def __init__(
        self,
        status: int,
        message: str,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.field = status, message, field
        self.headers = headers or RETRY_HEADERS.get(status, {})


def reply(
    content: bytes, media_type: str = JSON_TYPE, headers: Mapping[str, str] | None = None
) -> Response:
    named = {REQUEST_ID: find_request_id(), **(headers or {})}
    return Response(content, media_type=media_type, headers=named)


def fail(
    status: int,
    message: str,
    field: str | None = None,
    headers: Mapping[str, str] | None = None,
    path: str = "",
) -> Response:
    """The answer to a request for `path` that failed."""
    request_id = find_request_id()
    content = render_error(status, message, request_id, field, is_flat(path))
    return Response(
        content, status, {**(headers or {}), REQUEST_ID: request_id}, media_type=JSON_TYPE
    )


def is_flat(path: str) -> bool:
    """Whether clients of `path`, those of the Open Inference Protocol, read `error` as a text."""
    return path == "/v2" or path.startswith("/v2/")


def render_error(
    status: int, message: str, request_id: str, field: str | None = None, flat: bool = False
) -> bytes:
    """The one shape of every error; `flat` has the sentence as `error` and the rest beside it."""
    error = {
        "type": ERROR_TYPES[status],
        "message": message[:MAX_TEXT_CHARS],
        "field": field and field[:MAX_TEXT_CHARS],
        "request_id": request_id,
    }
    if flat:
        error["error"] = error.pop("message")
        return to_json(error)
    return to_json({"error": error})


async def on_refusal(request: Request, refusal: Refusal) -> Response:
    return fail(
        refusal.status, refusal.message, refusal.field, refusal.headers, request.scope["path"]
    )


async def on_http_error(request: Request, error: HTTPException) -> Response:
    return fail(error.status_code, error.detail, headers=error.headers, path=request.scope["path"])


async def on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    sentence = "the connection closed before the body was complete"
    return fail(400, sentence, path=request.scope["path"])


async def on_bug(request: Request, error: Exception) -> Response:
    sentence = "the server failed, its log has the reason under this request id"
    response = fail(500, sentence, path=request.scope["path"])
    logger.error("request %s failed", response.headers[REQUEST_ID], exc_info=error)
    return response


ERROR_HANDLERS: dict[
    int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]
] = {
    Refusal: on_refusal,
    HTTPException: on_http_error,
    ClientDisconnect: on_disconnect,
    Exception: on_bug,
}
