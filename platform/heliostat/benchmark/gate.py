"""What the gate costs a request: one application without and with it, in one process."""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from heliostat import keys
from heliostat.keys import Keyring, Limits
from heliostat.serve.desk import Desk
from heliostat.serve.gate import Gate
from heliostat.serve.ledger import Answer, Ask, Ledger, Office
from heliostat.storage import connect

REQUESTS = 20_000
# What HAProxy and a client of today send along.
HEADERS = [
    (b"host", b"127.0.0.1:8000"),
    (b"user-agent", b"client/1.0"),
    (b"accept", b"*/*"),
    (b"accept-encoding", b"gzip, deflate"),
    (b"content-type", b"application/json"),
    (b"content-length", b"5000"),
    (b"x-request-id", b"0123456789abcdef"),
    (b"x-forwarded-for", b"203.0.113.9"),
]


def measure(repeats: int, report: Callable[[str], None]) -> dict[str, float]:
    """Microseconds of CPU that a gate adds to a request: median of `repeats`, taken in turn."""
    cases = {
        "no limits": Limits(),
        "three limits": Limits(
            requests_per_second=1e6, tokens_per_minute=1e9, rows_per_month=10**12
        ),
    }
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, limits in cases.items():
            found[name].append(asyncio.run(_measure_once(limits)))
    micros = {name: statistics.median(seconds) * 1e6 for name, seconds in found.items()}
    for name, value in micros.items():
        report(f"a key with {name:<12} {value:6.1f} microseconds a request")
    return micros


async def _measure_once(limits: Limits) -> float:
    with tempfile.TemporaryDirectory() as directory:
        store = connect(directory)
        token, _ = keys.create(store, "benchmark", limits=limits)
        ring = Keyring(store)
        ring.refresh()
    office = Office(Ledger(time.monotonic, time.time, 0.0), lambda records: None)

    async def send(ask: Ask) -> Answer:
        return office.answer(ask)

    async with (desk := Desk(send)).open():
        bare = await _time(_answer, token)
        return await _time(Gate(_answer, ring.find, desk), token) - bare


async def _time(app: ASGIApp, token: str) -> float:
    headers = [*HEADERS, (b"authorization", f"Bearer {token}".encode())]

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        pass

    began = time.process_time()
    for number in range(REQUESTS):
        scope: Scope = {"type": "http", "path": "/v1/models/digits:predict", "headers": headers}
        await app(scope, receive, send)
        if number % 100 == 0:
            await asyncio.sleep(0)  # where reports and leases get their turn
    return (time.process_time() - began) / REQUESTS


async def _answer(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})
