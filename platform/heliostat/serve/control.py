"""The REST interface of Ray Serve: what is to run goes in, what runs and why not comes out."""

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.dashboard.utils import get_address_for_submission_client
from ray.exceptions import RayError

from heliostat.environment import EDGE_URL
from heliostat.errors import HeliostatError

POLL_SECONDS = 0.5
REPORT_SECONDS = 5.0
MAX_REASON_CHARS = 600
HTTP_OPTIONS = {"host": "127.0.0.1", "port": 8000}
REASON = re.compile(r"^[\w.]+(?:Error|Exception|Missing): ", re.MULTILINE)


class Serve:
    """Ray Serve of the cluster at `address`, or of the one that the environment names; what goes
    wrong there is a sentence. `pause` is how those wait who wait for it.
    """

    def __init__(
        self, address: str | None = None, pause: Callable[[float], None] = time.sleep
    ) -> None:
        self.pause = pause
        with _told():
            self._client = ServeSubmissionClient(get_address_for_submission_client(address))

    def describe(self) -> dict[str, Any]:
        with _told():
            details: dict[str, Any] = self._client.get_serve_details()
        return details

    def apply(self, config: dict[str, Any]) -> None:
        with _told():
            self._client.deploy_applications(config)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, RayError) as error:  # not sent, not answered 200, not let in
        raise HeliostatError(
            f"Ray Serve cannot be reached or refuses ({error!s:.{MAX_REASON_CHARS}}): check that "
            "the cluster runs and that RAY_API_SERVER_ADDRESS is its dashboard"
        ) from error


def await_running(client: Serve, names: Sequence[str], timeout_s: float) -> str | None:
    """Wait until Serve has settled the applications; return why one failed, if one did."""
    began = reported = time.monotonic()
    while True:
        found = client.describe()["applications"]
        apps = [found[name] for name in names if name in found]
        waiting = [app for app in apps if app["status"] != "RUNNING"]
        if not waiting:
            return None
        for app in waiting:
            if app["status"] == "DEPLOY_FAILED":
                return explain(app)
        now = time.monotonic()
        if now - reported >= REPORT_SECONDS:
            reported = now
            print(f"{now - began:4.0f} s: {describe_wait(waiting[0])}", flush=True)
        if now - began > timeout_s:
            return f"the replicas did not start within {timeout_s:g} s: {explain(waiting[0])}"
        client.pause(POLL_SECONDS)


def describe_wait(app: dict[str, Any]) -> str:
    """The states of the replicas, and what Serve says that they wait for."""
    replicas = (found for part in app["deployments"].values() for found in part["replicas"])
    states = Counter(replica["state"] for replica in replicas)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    return " - ".join(filter(None, (f"replicas {counts or 'not there yet'}", explain(app))))


def explain(app: dict[str, Any]) -> str:
    """The last error in what Serve says about an application, as one line."""
    parts = [app["message"], *(part["message"] for part in app["deployments"].values())]
    text = "\n".join(parts)
    starts = [match.start() for match in REASON.finditer(text)]
    return " ".join(text[starts[-1] if starts else 0 :].split())[:MAX_REASON_CHARS]


def find_url(client: Serve) -> str:
    """The address of the edge, or of Serve itself where there is no edge."""
    if EDGE_URL in os.environ:
        return os.environ[EDGE_URL]
    options = HTTP_OPTIONS | client.describe()["http_options"]
    host = "127.0.0.1" if options["host"] == "0.0.0.0" else options["host"]
    return f"http://{host}:{options['port']}"
