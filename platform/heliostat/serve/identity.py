"""The name of the request that is being answered: the edge's, so that a user can quote it."""

import random
import re
from contextvars import ContextVar

from starlette.types import ASGIApp, Receive, Scope, Send

REQUEST_ID = "x-request-id"
# The edge writes the header anew, so what has its form was made there.
FORM = re.compile(rb"[0-9a-f]{32}")
NAMED = "heliostat.request_id"
_current: ContextVar[str] = ContextVar("request_id")
# A name is no secret. Asking the kernel gives the interpreter's lock away, to a batch as a rule.
_random = random.Random()


class Identity:
    """Names every request before anything else sees it; one that has a name keeps it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and NAMED not in scope:
            sent = dict(scope["headers"]).get(REQUEST_ID.encode(), b"")
            scope[NAMED] = sent.decode() if FORM.fullmatch(sent) else make_request_id()
            _current.set(scope[NAMED])
        await self._app(scope, receive, send)


def find_request_id() -> str:
    """The id of the request that this task answers; a new one outside of any."""
    return _current.get(None) or make_request_id()


def make_request_id() -> str:
    return f"{_random.getrandbits(128):032x}"
