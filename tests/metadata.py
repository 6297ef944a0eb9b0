"""The metadata servers of two clouds, by hand: what they say, and what goes wrong with them."""

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

AWS_ROOT, GCP_ROOT = "/latest/meta-data/", "/computeMetadata/v1/instance/"
ACTION, ADVICE = AWS_ROOT + "spot/instance-action", AWS_ROOT + "events/recommendations/rebalance"
TOKEN = "x-aws-ec2-metadata-token"
PREEMPTED, MAINTENANCE = GCP_ROOT + "preempted", GCP_ROOT + "maintenance-event"


class Metadata:
    """Answers `said`, by path, to those who ask as each cloud wants to be asked: GCP if it says
    whether it is preempted, else AWS.

    `status` is answered to everything, `hangs` lets nobody have an answer. `asked` are the requests
    so far, `tokens` those that AWS would let in.
    """

    def __init__(self, said: dict[str, str]) -> None:
        self.said = said
        self.status: int | None = None
        self.hangs = False
        self.asked: list[str] = []
        self.tokens: set[str] = set()
        self.url = ""
        self.end = 0.0
        self.ended = threading.Event()

    def take_back(self, seconds_from_now: float) -> None:
        """AWS gives notice of an end."""
        self.end = time.time() + seconds_from_now
        end = datetime.fromtimestamp(self.end, UTC)
        self.said[ACTION] = f'{{"action": "terminate", "time": "{end:%Y-%m-%dT%H:%M:%SZ}"}}'

    def answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        self.asked.append(f"{method} {path}")
        if self.hangs:
            self.ended.wait(60)
        if self.status is not None:
            return self.status, "trouble"
        if PREEMPTED in self.said and headers.get("metadata-flavor") != "Google":
            return 403, "Missing Metadata-Flavor:Google header."
        if path == "/latest/api/token" and PREEMPTED not in self.said:
            return self._give_token(method, headers)
        if path.startswith(AWS_ROOT) and headers.get(TOKEN) not in self.tokens:
            return 401, "Unauthorized"
        return (200, self.said[path]) if path in self.said else (404, "Not Found")

    def _give_token(self, method: str, headers: dict[str, str]) -> tuple[int, str]:
        life = headers.get(f"{TOKEN}-ttl-seconds", "")
        if method != "PUT" or not life.isdigit() or not 1 <= int(life) <= 21_600:
            return 400, "Bad Request"
        self.tokens.add(token := uuid.uuid4().hex)
        return 200, token


@contextmanager
def serve_metadata(said: dict[str, str]) -> Iterator[Metadata]:
    metadata = Metadata(said)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, text = metadata.answer(self.command, self.path, headers)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_PUT = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    metadata.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield metadata
    finally:
        metadata.ended.set()
        server.shutdown()
        server.server_close()
