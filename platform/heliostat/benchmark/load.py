"""Load on one HTTP address by wrk, a C program that takes some microseconds for each request."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from heliostat.errors import HeliostatError

PROGRAM, TIMEOUT_SECONDS = "wrk", 30
# Texts of JSON that are ASCII are texts of Lua too.
SCRIPT = """
wrk.method = "POST"
{headers}
local file = io.open({body}, "rb")
wrk.body = file:read("*a")
file:close()
function done(summary, latency, requests)
    local errors = summary.errors
    local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
    io.write(string.format('\\n{{"requests": %d, "microseconds": %d, "failed": %d, ',
        summary.requests, summary.duration, failed))
    io.write(string.format('"p50": %d, "p99": %d}}',
        latency:percentile(50), latency:percentile(99)))
end
"""


@dataclass(frozen=True)
class Request:
    """A POST that is sent again and again."""

    url: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """What a server did under a load; the latencies are in ms."""

    requests_per_second: float
    p50_ms: float
    p99_ms: float


def check_program() -> None:
    """Raises HeliostatError: there is no wrk."""
    if not shutil.which(PROGRAM):
        raise HeliostatError(f"the load comes from {PROGRAM}, which is not here: apt install wrk")


def press(request: Request, connections: int, seconds: int) -> Reading:
    """Send `request` over so many connections, a new one on each as soon as the last is answered.

    Raises:
        HeliostatError: a request failed or was answered otherwise than 2xx or 3xx.
    """
    with tempfile.TemporaryDirectory() as folder:
        body, script = Path(folder, "body"), Path(folder, "script.lua")
        body.write_bytes(request.body)
        script.write_text(render(request, body))
        command = [
            PROGRAM,
            "-t1",
            f"--timeout={TIMEOUT_SECONDS}s",
            f"-c{connections}",
            f"-d{seconds}s",
            "-s",
            str(script),
        ]
        done = subprocess.run([*command, request.url], capture_output=True, text=True, check=False)
    if done.returncode:
        raise HeliostatError(f"{PROGRAM} failed: {(done.stderr or done.stdout).strip()[-300:]}")
    return read_report(done.stdout, request.url)


def render(request: Request, body: Path) -> str:
    """wrk's script: nothing of it is in the list of processes, where a key must not be."""
    headers = (
        f"wrk.headers[{json.dumps(name)}] = {json.dumps(value)}"
        for name, value in request.headers.items()
    )
    return SCRIPT.format(headers="\n".join(headers), body=json.dumps(str(body)))


def read_report(text: str, url: str) -> Reading:
    """The reading in what wrk printed, whose last line is ours.

    Raises:
        HeliostatError: not every request was answered well.
    """
    found = json.loads(text.splitlines()[-1])
    if found["failed"] or not found["requests"]:
        raise HeliostatError(f"{url} failed {found['failed']} of {found['requests']} requests")
    rate = found["requests"] / found["microseconds"] * 1e6
    return Reading(rate, found["p50"] / 1000, found["p99"] / 1000)
