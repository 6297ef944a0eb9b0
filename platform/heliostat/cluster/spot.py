"""Watches for the notice that this machine will be taken away, and drains its node of Ray once."""

import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from heliostat.cluster.notice import Clock, Notice, Source, Unheard

# For so long after its end a notice still counts, and a machine that stays may yet go.
GRACE_SECONDS = 60.0
REMIND_SECONDS = 600.0
# Serve stops a replica `deploy.request_timeout_s` (30 s) before the deadline, whether another one
# has taken its place or not. Where little more than that is left Ray is told no deadline: then the
# other one comes first.
SHORT_SECONDS = 60.0
# Python imports Ray, on a machine that is busy with what it will lose.
COMMAND_SECONDS = 20.0
HEARD = "it is heard again"


@dataclass(frozen=True)
class Status:
    """What is said now, and the notice that the node was drained for, if it was.

    `withdrawn` is since when that one is said no more.
    """

    notice: Notice | None = None
    drained: Notice | None = None
    withdrawn: float | None = None


@dataclass(frozen=True)
class Drain:
    """Drain the node; Ray is told that it goes after `seconds`, None: at some time."""

    reason: str
    seconds: int | None


@dataclass(frozen=True)
class Past:
    """The machine should be gone, and was not drained: the notice is not of this life of it."""


@dataclass(frozen=True)
class Stays:
    """The node was drained, and its machine is still there, `since` it should not be."""

    since: float


Decision = Drain | Past | Stays | None


class Refused(Exception):
    """The node was not drained; says why."""


def hear(status: Status, notice: Notice | None, now: float) -> Status:
    """What `notice` makes of `status`."""
    withdrawn = status.withdrawn if status.withdrawn is not None else now
    return replace(status, notice=notice, withdrawn=None if notice else withdrawn)


def decide(status: Status, now: float, heeds_advice: bool = False) -> Decision:
    """What to do at `now`. One notice drains once; another, and one of another time, drains again.

    What is only feared drains if `heeds_advice`. Ray never takes a drain back.
    """
    notice, drained = status.notice, status.drained
    if notice and notice != drained and (heeds_advice or notice.at is not None):
        if notice.at is None:
            return Drain(notice.what, None)
        if notice.at - now > SHORT_SECONDS:
            return Drain(notice.what, round(notice.at - now))
        if now <= notice.at + GRACE_SECONDS:
            return Drain(notice.what, None)
        if drained is None:
            return Past()
    if drained:
        since = drained.at if status.withdrawn is None else status.withdrawn
        if since is not None and now > since + GRACE_SECONDS:
            return Stays(since)
    return None


class Watch:
    """Asks `source`, drains by `drain` and says in lines what happens, each of them once."""

    def __init__(
        self,
        source: Source,
        drain: Callable[[Drain], str],
        say: Callable[[str], None],
        heeds_advice: bool = False,
        clock: Clock = time.time,
    ) -> None:
        self._source, self._drain, self._say = source, drain, say
        self._heeds_advice, self._clock = heeds_advice, clock
        self._status = Status()
        self._said = {"source": HEARD, "notice": ""}

    def look(self) -> None:
        """Ask once, and do what is to be done. A source that is not heard withdraws nothing."""
        try:
            notice = self._source.listen()
            self._tell("source", HEARD)
        except Unheard as error:
            notice = self._status.notice
            self._tell("source", f"it is not heard: {error}")
        now = self._clock()
        self._status = hear(self._status, notice, now)
        self._tell("notice", self._describe(notice, now), key=str(notice or ""))
        match decide(self._status, now, self._heeds_advice):
            case Drain() as order:
                self._act(order, now)
            case Past():
                self._tell("drain", "the end that it names is past: nothing is drained")
            case Stays(since):
                self._warn(now - since)

    def _act(self, order: Drain, heard: float) -> None:
        try:
            said = self._drain(order)
        except Refused as error:
            self._tell("drain", f"not drained, trying again: {error}")
        else:
            self._status = replace(self._status, drained=self._status.notice)
            self._said.pop("drain", None)
            self._say(f"{said}; it took {self._clock() - heard:.1f} s")

    def _describe(self, notice: Notice | None, now: float) -> str:
        if notice is None:
            return "the notice is withdrawn"
        if notice.at is not None:
            return f"notice: {notice.what} at {render_time(notice.at)}, in {notice.at - now:.0f} s"
        ignored = "" if self._heeds_advice else "; nothing is drained for that (--heed-advice does)"
        return f"advice: {notice.what}{ignored}"

    def _warn(self, seconds: float) -> None:
        text = (
            f"WARNING: this machine stays, {seconds / 60:.0f} min after it should have gone, and "
            "Ray gives a drained node no work again: start Ray on it anew, or terminate it"
        )
        self._tell("stays", text, key=str(seconds // REMIND_SECONDS))

    def _tell(self, topic: str, text: str, key: str | None = None) -> None:
        """Say `text` of `topic`, unless its `key`, by default the text, is that of the last."""
        if self._said.get(topic) != (key := text if key is None else key):
            self._said[topic] = key
            self._say(text)


class Claim:
    """A file that holds the name of the newest watch of a machine: the one before ends."""

    def __init__(self, path: Path) -> None:
        self._path, self._name = path, secrets.token_hex(8)
        path.write_text(self._name)

    def holds(self) -> bool:
        try:
            return self._path.read_text() == self._name
        except FileNotFoundError:
            return True


def drain_by_command(target: Sequence[str]) -> Callable[[Drain], str]:
    """Drains by `heliostat drain` with the options of `target`, which say of which node.

    A process of its own: the client of a Ray that went away can hang, or end its process.
    """

    def drain(order: Drain) -> str:
        deadline = [] if order.seconds is None else ["--seconds", str(order.seconds)]
        return run_drain([*target, *deadline, "--reason", order.reason])

    return drain


def run_drain(options: Sequence[str]) -> str:
    """The last line that `heliostat drain` prints. Raises Refused, with its sentence."""
    command = [sys.executable, "-P", "-m", "heliostat.cli", "drain", *options]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Refused(f"Ray did not answer within {COMMAND_SECONDS:.0f} s") from error
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or ["no reason"]
    if done.returncode < 0:  # Ray aborts, then says where
        raise Refused(lines[0])
    if done.returncode:
        raise Refused(lines[-1].removeprefix("error: "))
    return lines[-1]


def render_time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"
