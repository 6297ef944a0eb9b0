"""A real HAProxy before a real server in this process, raw sockets to it, and what it let pass."""

import asyncio
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from heliostat.edge import Edge
from heliostat.local import edge as local_edge
from heliostat.local import machine, processes

GOOD = b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


@dataclass
class Upstream:
    """What stands behind an edge; `seen` are the heads of the requests that reached it."""

    app: ASGIApp
    port: int
    seen: list[dict[str, str]] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def run(self) -> Iterator["Upstream"]:
        # A replica keeps an idle connection longer than the edge keeps it for reuse, as here.
        config = uvicorn.Config(
            self._build(),
            port=self.port,
            log_level="error",
            lifespan="off",
            timeout_keep_alive=90,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        processes.wait_for(lambda: server.started, 10)
        try:
            yield self
        finally:
            server.should_exit = server.force_exit = True
            thread.join()

    def _build(self) -> Starlette:
        async def echo(request: Request) -> Response:
            self.seen.append({**request.headers, ":url": str(request.url)})
            body = await request.body()
            return JSONResponse({"headers": dict(request.headers), "body_bytes": len(body)})

        async def fail(request: Request) -> Response:
            status = request.path_params["status"]
            return PlainTextResponse("Ping /-/routes for routes", status)

        async def wait(request: Request) -> Response:
            """Answers once `release` is set; `gone` is set if the client leaves before."""
            self.seen.append(dict(request.headers))
            while not self.release.is_set():
                if await request.is_disconnected():
                    self.gone.set()
                    break
                await asyncio.sleep(0.01)
            return JSONResponse({})

        async def tell_health(request: Request) -> Response:
            return PlainTextResponse("success")

        return Starlette(
            routes=[
                Route("/-/healthz", tell_health),
                Route("/v1/echo", echo, methods=["GET", "POST"]),
                Route("/v1/fail/{status:int}", fail, methods=["GET", "POST"]),
                Route("/v2/models/fail{status:int}", fail),
                Route("/v1/wait", wait, methods=["GET", "POST"]),
                Mount("/", self.app),
            ]
        )


@contextmanager
def run_edge(edge: Edge, directory: Path) -> Iterator[str]:
    """The marker of the processes of a running edge."""
    marker = secrets.token_hex(8)
    try:
        local_edge.start(edge, marker, directory, directory / "edge.log")
        yield marker
    finally:
        processes.end(marker, grace_seconds=0)


def pick_port() -> int:
    return machine.pick_ports(1)[0]


def exchange(port: int, *parts: bytes, timeout: float = 20) -> bytes:
    """Send bytes as they are; all that comes back until the other side closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as client:
        with suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                client.sendall(part)
        return read_all(client)


def read_all(client: socket.socket) -> bytes:
    answer = b""
    with suppress(ConnectionResetError):
        while piece := client.recv(65536):
            answer += piece
    return answer


def status_of(answer: bytes) -> int:
    """The status of the first answer in these bytes."""
    version, status, _ = answer.split(b" ", 2)
    assert version.startswith(b"HTTP/1."), answer
    return int(status)
