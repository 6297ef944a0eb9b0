"""The name of the request that is being answered: the edge's, so that a user can quote it."""

import re
import secrets
from contextvars import ContextVar

from starlette.types import ASGIApp, Receive, Scope, Send

REQUEST_ID = "x-request-id"
# The edge writes the header anew, so what has its form was made there.
FORM = re.compile(rb"[0-9a-f]{32}")
_current: ContextVar[str] = ContextVar("request_id")


class Identity:
    """Names every request before anything else sees it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            sent = dict(scope["headers"]).get(REQUEST_ID.encode(), b"")
            _current.set(sent.decode() if FORM.fullmatch(sent) else make_request_id())
        await self._app(scope, receive, send)


def find_request_id() -> str:
    """The id of the request that this task answers; a new one outside of any."""
    return _current.get(None) or make_request_id()


def make_request_id() -> str:
    return secrets.token_hex(16)
