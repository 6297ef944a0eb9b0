"""Answers on their way out of a replica: each leaves in one piece."""

import asyncio
from typing import TYPE_CHECKING, Any, cast

from uvicorn import config

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as AutoHTTPProtocol
else:
    from uvicorn.protocols.http.auto import AutoHTTPProtocol


class Gathering:
    """A transport that writes at once what it is given in one turn of the event loop.

    Uvicorn writes the headers of an answer and then its body. As two system calls they wake the
    proxy twice, and of a process that is killed between them an answer gets out that never ends,
    where the proxy would have asked another replica.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._held: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        held, self._held = self._held, []
        if held:
            self._transport.write(b"".join(held))


class Protocol(AutoHTTPProtocol):
    """HTTP as uvicorn speaks it, over a transport that gathers."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, Gathering(transport, self.loop)))


def install() -> None:
    """Let the servers that this process starts from now on speak so; Serve has no setting."""
    assert "auto" in config.HTTP_PROTOCOLS
    config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{Protocol.__name__}"
