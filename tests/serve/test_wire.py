"""An answer leaves in one piece: what uvicorn writes in one turn is one write of the socket."""

import asyncio
import socket
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send
from uvicorn import Config
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.importer import import_from_string
from uvicorn.server import ServerState

from heliostat.serve import wire

REQUEST = b"GET / HTTP/1.1\r\nhost: here\r\n\r\n"


class Recorded:
    """What a transport is asked to do, in order."""

    def __init__(self) -> None:
        self.done: list[bytes | str] = []

    def write(self, data: bytes) -> None:
        self.done.append(data)

    def close(self) -> None:
        self.done.append("closed")

    def is_closing(self) -> bool:
        return "closed" in self.done

    def get_extra_info(self, name: str) -> Any:
        return None


async def converse(app: Any, *requests: bytes) -> list[bytes | str]:
    """What becomes of the transport of a client who sends these, one after the other's answer."""
    loop = asyncio.get_running_loop()
    protocol = wire.Protocol(Config(app, log_config=None), ServerState(), {}, loop)
    transport: Any = Recorded()
    protocol.connection_made(transport)
    for request in requests:
        protocol.data_received(request)
        for _ in range(20):
            await asyncio.sleep(0)
    done = list(transport.done)
    protocol.connection_lost(None)
    return done


async def whole(scope: Scope, receive: Receive, send: Send) -> None:
    headers = [(b"content-length", b"5")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"hello"})


async def streamed(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200})
    for piece in (b"one", b"two"):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body"})


def test_headers_and_body_are_one_write() -> None:
    (answer,) = asyncio.run(converse(whole, REQUEST))
    assert isinstance(answer, bytes)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n\r\nhello")


def test_each_answer_on_a_connection_is_one_write() -> None:
    answers = asyncio.run(converse(whole, REQUEST, REQUEST))
    assert [answer[-5:] for answer in answers] == [b"hello", b"hello"]


def test_pieces_that_come_later_are_not_waited_for() -> None:
    head, first, *rest = asyncio.run(converse(streamed, REQUEST))
    assert isinstance(head, bytes)
    assert head.endswith(b"\r\n\r\n")
    assert first == b"3\r\none\r\n"
    assert b"".join(piece for piece in rest if isinstance(piece, bytes)) == (
        b"3\r\ntwo\r\n0\r\n\r\n"
    )


def test_a_connection_is_closed_behind_what_was_written() -> None:
    refused, closed = asyncio.run(converse(whole, b"no request\r\n\r\n"))
    assert isinstance(refused, bytes)
    assert refused.startswith(b"HTTP/1.1 400 ")
    assert closed == "closed"


def test_servers_speak_so_once_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HTTP_PROTOCOLS, "auto", HTTP_PROTOCOLS["auto"])
    wire.install()
    assert import_from_string(HTTP_PROTOCOLS["auto"]) is wire.Protocol


def test_a_real_socket_gets_the_whole_answer_at_once() -> None:
    async def ask() -> bytes:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: wire.Protocol(Config(whole, log_config=None), ServerState(), {}),
            "127.0.0.1",
            0,
        )
        with socket.create_connection(server.sockets[0].getsockname()) as client:
            client.setblocking(False)
            await loop.sock_sendall(client, REQUEST)
            answer = await loop.sock_recv(client, 4096)
        server.close()
        return answer

    assert asyncio.run(ask()).endswith(b"\r\n\r\nhello")
