"""What clouds say of the end of a machine, and how each of them is asked."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from heliostat.errors import HeliostatError

Clock = Callable[[], float]

TIMEOUT_SECONDS = 2.0
MAX_BYTES = 65_536
MAX_QUOTED = 80
AWS_URL = "http://169.254.169.254"
AWS_ACTION, AWS_ADVICE = "spot/instance-action", "events/recommendations/rebalance"
TOKEN_SECONDS = 21_600
GCP_URL = "http://metadata.google.internal"
# What GCP says under which key: what that means and for how many seconds the machine stays, or None
# if it stays for good. A machine that moves to another host keeps its memory.
GCP_EVENTS: dict[str, dict[str, tuple[str, float] | None]] = {
    "preempted": {"FALSE": None, "TRUE": ("GCP preempts this machine", 30.0)},
    "maintenance-event": {
        "NONE": None,
        "MIGRATE_ON_HOST_MAINTENANCE": None,
        "TERMINATE_ON_HOST_MAINTENANCE": ("GCP stops this machine to mend its host", 60.0),
    },
}
# For which an empty file may be one that somebody is about to write into.
SETTLE_SECONDS = 1.0
AUTO_SECONDS = 30.0


class Unheard(Exception):
    """A cloud could not be asked, or said what nobody understands."""


@dataclass(frozen=True)
class Notice:
    """`at` is when the machine goes, in seconds since 1970; None if that is only feared."""

    what: str
    at: float | None


class Source(Protocol):
    """Where notices come from; `poll_seconds` is how often to ask."""

    name: str
    poll_seconds: float

    def listen(self) -> Notice | None:
        """What is said now. Raises Unheard."""
        ...


class Aws:
    """The metadata server of EC2 in its version 2, which wants a token with each question.

    Action and time of https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/
    spot-instance-termination-notices.html; 404 says that there is no notice.
    """

    name = "AWS"
    poll_seconds = 5.0

    def __init__(self, url: str | None = None) -> None:
        self._url = url or AWS_URL
        self._token = ""

    def listen(self) -> Notice | None:
        if (text := self._read(AWS_ACTION)) is not None:
            document = _parse(text)
            action = document.get("action")
            if action not in ("terminate", "stop", "hibernate"):
                raise Unheard(f"{AWS_ACTION} is {_quote(text)}, without an action that is known")
            return Notice(f"AWS will {action} this machine", _parse_time(document.get("time")))
        if self._read(AWS_ADVICE) is not None:
            return Notice("AWS fears to need this machine back (rebalance recommendation)", None)
        return None

    def _read(self, path: str) -> str | None:
        target = f"/latest/meta-data/{path}"
        status, text = self._ask(target)
        if status == 401:  # the token has expired
            self._token = ""
            status, text = self._ask(target)
        if status not in (200, 404):
            raise Unheard(f"{self._url}{target} answers {status}")
        return text if status == 200 else None

    def _ask(self, target: str) -> tuple[int, str]:
        if not self._token:
            life = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
            status, token = ask(self._url, "/latest/api/token", life, "PUT")
            if status != 200:
                raise Unheard(f"{self._url}/latest/api/token answers {status}")
            self._token = token
        return ask(self._url, target, {"X-aws-ec2-metadata-token": self._token})


class Gcp:
    """The metadata server of Compute Engine, which says that an end has begun, not when it will be.

    Often asked, since of 30 seconds each counts.
    """

    name = "GCP"
    poll_seconds = 1.0

    def __init__(self, url: str | None = None, clock: Clock = time.time) -> None:
        self._url, self._clock = url or GCP_URL, clock
        self._heard: dict[str, float] = {}

    def listen(self) -> Notice | None:
        said = (self._read(key) for key in GCP_EVENTS)
        what, seconds = next((event for event in said if event), ("", 0.0))
        # The same notice at each question, so that it ends when it was said to.
        self._heard = {what: self._heard.get(what, self._clock())} if what else {}
        return Notice(what, self._heard[what] + seconds) if what else None

    def _read(self, key: str) -> tuple[str, float] | None:
        target = f"/computeMetadata/v1/instance/{key}"
        status, text = ask(self._url, target, {"Metadata-Flavor": "Google"})
        if status != 200:
            raise Unheard(f"{self._url}{target} answers {status}")
        if text.strip() not in GCP_EVENTS[key]:
            raise Unheard(f"{key} is {_quote(text)}, not one of {', '.join(GCP_EVENTS[key])}")
        return GCP_EVENTS[key][text.strip()]


class File:
    """A file that somebody writes when the machine will go: for tests, other clouds and by hand.

    It holds JSON, `{"seconds": 60}` from when it was written or `{"time": "2027-01-31T12:00:00Z"}`,
    or nothing: the machine goes now.
    """

    poll_seconds = 1.0

    def __init__(self, path: Path, clock: Clock = time.time) -> None:
        self.name = f"the file {path}"
        self._path, self._clock = path, clock

    def listen(self) -> Notice | None:
        try:
            text, written = self._path.read_text(errors="replace"), self._path.stat().st_mtime
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Unheard(f"it cannot be read: {error.strerror}") from error
        if not text.strip():
            settled = self._clock() - written >= SETTLE_SECONDS
            return Notice("this machine goes now", written) if settled else None
        return Notice("this machine goes", _read_end(_parse(text), written))


CLOUDS: dict[str, Callable[[str | None], Source]] = {"aws": Aws, "gcp": Gcp}


def choose_source(
    text: str, url: str | None = None, pause: Callable[[float], None] = time.sleep
) -> Source:
    """`aws`, `gcp`, `file:PATH`, or `auto`: the cloud whose metadata server answers here.

    Raises:
        HeliostatError: that is no source, or no cloud answers.
    """
    if url is not None and (urlsplit(url).scheme != "http" or not urlsplit(url).hostname):
        raise HeliostatError(f"--metadata-url {url} is no http://HOST:PORT: metadata is plain HTTP")
    if text in CLOUDS:
        return CLOUDS[text](url)
    kind, _, path = text.partition(":")
    if kind == "file" and path and url is None:
        return File(Path(path).expanduser())
    if text != "auto":
        raise HeliostatError(
            f"--source {text} is no source of notices: use {', '.join(CLOUDS)}, file:PATH (without "
            "--metadata-url) or auto"
        )
    until = time.monotonic() + AUTO_SECONDS
    while True:
        answers: dict[str, str] = {}
        for name, build in CLOUDS.items():
            source = build(url)
            try:
                source.listen()
            except Unheard as error:
                answers[name] = str(error)
            else:
                return source
        if time.monotonic() > until:
            raise HeliostatError(
                "no cloud answers here, so --source auto has nobody to ask: give --source aws, gcp "
                f"or file:PATH ({'; '.join(answers.values())})"
            )
        pause(1.0)


def ask(
    url: str, target: str, headers: dict[str, str] | None = None, method: str = "GET"
) -> tuple[int, str]:
    """Status and body of a request that no proxy of the environment sees.

    Raises:
        Unheard: there is no answer.
    """
    place = urlsplit(url)
    connection = HTTPConnection(place.hostname or "", place.port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request(method, target, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read(MAX_BYTES).decode("utf-8", "replace")
    except (OSError, HTTPException, ValueError) as error:
        raise Unheard(f"{url} does not answer: {error or type(error).__name__}") from error
    finally:
        connection.close()


def _read_end(document: dict[str, Any], written: float) -> float:
    seconds = document.get("seconds")
    if isinstance(seconds, int | float) and not isinstance(seconds, bool):
        return written + max(0.0, seconds)
    return _parse_time(document.get("time"))


def _parse(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise Unheard(f"{_quote(text)} is no JSON object")
    return document


def _parse_time(value: object) -> float:
    """Seconds since 1970 of an ISO 8601 time, in UTC unless it says otherwise."""
    try:
        time = datetime.fromisoformat(str(value))
    except ValueError as error:
        raise Unheard(f"{_quote(str(value))} is no time as 2027-01-31T12:00:00Z") from error
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _quote(text: str) -> str:
    return repr(text[:MAX_QUOTED])
