"""A real HTTP proxy before a real S3 server that injects faults by request, never by time."""

import http.client
import os
import random
import socket
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit

HOP_HEADERS = {"connection", "expect", "keep-alive", "transfer-encoding"}


@dataclass(frozen=True)
class Request:
    """One request as the client sent it; `number` counts from 0 since the plan was set."""

    number: int
    method: str
    target: str
    headers: dict[str, str]
    body: bytes = field(repr=False)

    @property
    def operation(self) -> str:
        """GET, PUT, HEAD, DELETE, LIST, or one of START, PART, COMPLETE, ABORT of an upload."""
        query = urlsplit(self.target).query
        by_query = {
            ("GET", "list-type="): "LIST",
            ("POST", "uploads"): "START",
            ("PUT", "uploadId="): "PART",
            ("POST", "uploadId="): "COMPLETE",
            ("DELETE", "uploadId="): "ABORT",
        }
        found = (by_query[key] for key in by_query if key[0] == self.method and key[1] in query)
        return next(found, self.method)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


class Exchange:
    """One request and the connection on which its answer goes back."""

    def __init__(self, request: Request, upstream: str, connection: socket.socket) -> None:
        self.request = request
        self._upstream = urlsplit(upstream)
        self._connection = connection
        self.is_open = True

    def forward(self) -> Answer:
        """Let the real server do it."""
        upstream = http.client.HTTPConnection(self._upstream.netloc, timeout=60)
        try:
            request = self.request
            upstream.request(request.method, request.target, request.body, request.headers)
            answer = upstream.getresponse()
            headers = {k: v for k, v in answer.getheaders() if k.lower() not in HOP_HEADERS}
            return Answer(answer.status, headers, answer.read())
        finally:
            upstream.close()

    def send(self, answer: Answer, body_bytes: int | None = None) -> None:
        """Send the answer; with `body_bytes` only so much of its body before the line is cut."""
        length = {} if self.request.method == "HEAD" else {"Content-Length": len(answer.body)}
        headers = {**answer.headers, **length}
        lines = [f"HTTP/1.1 {answer.status} -", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
        self._connection.sendall("\r\n".join(lines).encode("latin-1") + answer.body[:body_bytes])
        if body_bytes is not None:
            self.close()

    def close(self) -> None:
        self.is_open = False

    def reset(self) -> None:
        """End the connection with a TCP reset instead of an orderly end."""
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self._connection.detach())
        self.close()

    def wait_until_client_leaves(self) -> None:
        self._connection.recv(1)
        self.close()


Fault = Callable[[Exchange], None]
Plan = Callable[[Request], Fault | None]


def refuse(status: int, code: str) -> Fault:
    """An S3 error in the place of an answer; the request is not performed."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    return lambda exchange: exchange.send(Answer(status, {"Content-Type": "application/xml"}, body))


def cut(share: float) -> Fault:
    """Perform the request and cut the connection after a share of the body of the answer."""

    def fault(exchange: Exchange) -> None:
        answer = exchange.forward()
        exchange.send(answer, body_bytes=int(len(answer.body) * share))

    return fault


def flip(exchange: Exchange) -> None:
    """Perform the request and damage the last byte of the body of the answer."""
    answer = exchange.forward()
    exchange.send(replace(answer, body=answer.body[:-1] + bytes([answer.body[-1] ^ 1])))


def flip_request(exchange: Exchange) -> None:
    """Damage the last byte of the body of the request on its way to the server."""
    body = exchange.request.body
    exchange.request = replace(exchange.request, body=body[:-1] + bytes([body[-1] ^ 1]))
    exchange.send(exchange.forward())


def lose_answer(exchange: Exchange) -> None:
    """Perform the request, then drop the connection without an answer."""
    exchange.forward()
    exchange.close()


def reset(exchange: Exchange) -> None:
    """Drop the connection without performing the request."""
    exchange.reset()


def stall(exchange: Exchange) -> None:
    """Accept the request and never answer."""
    exchange.wait_until_client_leaves()


def stall_midway(exchange: Exchange) -> None:
    """Perform the request, send half of the body of the answer and no more."""
    answer = exchange.forward()
    exchange.send(answer, body_bytes=len(answer.body) // 2)
    exchange.wait_until_client_leaves()


def garble(exchange: Exchange) -> None:
    """A gateway on the way answers with its own page."""
    exchange.send(Answer(502, {"Content-Type": "text/html"}, b"<html><p>Bad gateway<br></html>"))


def pretend(exchange: Exchange) -> None:
    """Answer that it was done without doing it."""
    exchange.send(Answer(200, {"ETag": '"0"'}, b""))


def first(count: int, fault: Fault, operation: str | None = None) -> Plan:
    """A fault for each of the first `count` requests (of the operation, if one is named)."""
    numbers = iter(range(count))

    def plan(request: Request) -> Fault | None:
        fits = operation in (None, request.operation)
        return fault if fits and next(numbers, None) is not None else None

    return plan


def share_of(share: float, *faults: Fault, seed: int = 0) -> Plan:
    """One of the faults for a random share of the requests."""
    chance = random.Random(seed)
    return lambda request: chance.choice(faults) if chance.random() < share else None


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that left in the middle is no error here."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class FaultProxy:
    """Stands before `upstream` and asks `plan` about each request; refuses until started."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self._plan: Plan = lambda request: None
        self._requests: list[Request] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler(), bind_and_activate=False)
        self._server.server_bind()
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()

    def start(self) -> None:
        self._server.server_activate()
        self._thread.start()

    def inject(self, plan: Plan) -> None:
        """Count from 0 again and inject by this plan."""
        with self._lock:
            self._requests.clear()
            self._plan = plan

    def operations(self) -> list[str]:
        """What was sent since the plan was set, in order."""
        with self._lock:
            return [request.operation for request in self._requests]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP_HEADERS}
                with proxy._lock:
                    number = len(proxy._requests)
                    request = Request(number, self.command, self.path, headers, body)
                    proxy._requests.append(request)
                    fault = proxy._plan(request)
                exchange = Exchange(request, proxy._upstream, self.connection)
                fault(exchange) if fault else exchange.send(exchange.forward())
                self.close_connection = not exchange.is_open

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
            setattr(Handler, f"do_{method}", Handler._serve)
        return Handler
