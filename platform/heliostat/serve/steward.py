"""Who brings a candidate to its end, whatever becomes of the command that asked for it."""

import io
import logging
import threading
import time
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from heliostat import registry
from heliostat.errors import HeliostatError
from heliostat.serve.control import Serve
from heliostat.serve.delivery import Tally
from heliostat.serve.deploy import find_code, try_out
from heliostat.serve.fork import Side
from heliostat.serve.office import NAMESPACE, ON_HEAD
from heliostat.serve.scores import Scoreboard, find_board
from heliostat.serve.table import Candidate
from heliostat.spec import DeploySpec
from heliostat.storage import Store, connect

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
LINGER_SECONDS = 60.0  # for somebody to ask how it ended


class Stopped(Exception):
    """Somebody wants the candidate taken back."""


@dataclass(frozen=True)
class Told:
    """The lines that were said after those known already, and how many there are in all.

    `ended` says why it ended, which is nothing if all went well; None while it goes on.
    """

    lines: tuple[str, ...]
    count: int
    ended: str | None


class Steward:
    """The actor: tries `candidate` out in a thread, and hears from the replicas how it does.

    Ray starts it again if its process dies, and it goes on where the table says that it was.
    """

    def __init__(self, root: str, name: str, how: DeploySpec, candidate: Candidate) -> None:
        self._board, self._lines = Scoreboard(), _Lines()
        self._stopped = threading.Event()
        self._ended: str | None = None
        again = ray.get_runtime_context().was_current_actor_reconstructed
        work = (connect(root), name, how, candidate, again)
        threading.Thread(target=self._run, args=work, daemon=True).start()

    def add(self, sums: Mapping[Side, Tally]) -> None:
        self._board.add(sums)

    def read(self, known: int) -> Told:
        lines = tuple(self._lines.whole)
        return Told(lines[known:], len(lines), self._ended)

    def stop(self) -> None:
        self._stopped.set()

    def _run(
        self, store: Store, name: str, how: DeploySpec, candidate: Candidate, again: bool
    ) -> None:
        with redirect_stdout(self._lines):
            self._ended = self._try_out(store, name, how, candidate, again)
        time.sleep(LINGER_SECONDS)
        ray.kill(ray.get_runtime_context().current_actor)

    def _try_out(
        self, store: Store, name: str, how: DeploySpec, candidate: Candidate, again: bool
    ) -> str:
        try:
            version = registry.resolve(store, f"{name}:{candidate.number}")
            client = Serve(ray.get_runtime_context().gcs_address, self._pause)
            try_out(store, client, version, how, candidate, self._board, again)
        except (HeliostatError, Stopped) as error:
            return str(error)
        except Exception as error:
            logger.exception("the candidate of %s has no end", name)
            return f"this is a fault of the platform: {error!r}"
        return ""

    def _pause(self, seconds: float) -> None:
        """Raises Stopped: once, so that taking back has the time it takes."""
        if self._stopped.wait(seconds):
            self._stopped.clear()
            raise Stopped("the deploy was interrupted")


class _Lines(io.TextIOBase):
    """What is printed, line by line."""

    def __init__(self) -> None:
        self.whole: list[str] = []
        self._open = ""

    def write(self, text: str) -> int:
        *whole, self._open = (self._open + text).split("\n")
        self.whole += whole
        return len(text)


def deliver(store: Store, name: str, how: DeploySpec, candidate: Candidate, code: str) -> None:
    """Have a steward try `candidate` out, and tell what it says until its end.

    It goes on if this process dies. An interrupt is passed on: then it takes the candidate back.

    Raises:
        HeliostatError: the candidate did not start or was worse, and was taken back.
    """
    ray.init(ignore_reinit_error=True, logging_level="ERROR", log_to_driver=False)
    options = {
        "name": find_board(name, candidate.proposal),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": -1,
        "num_cpus": 0,
        "resources": ON_HEAD,
        "runtime_env": find_code(store, code),
    }
    steward = ray.remote(Steward).options(**options).remote(store.uri, name, how, candidate)
    try:
        ended = _look_on(steward)
    except BaseException:
        with suppress(RayError):
            steward.stop.remote()
            _look_on(steward)
        raise
    if ended:
        raise HeliostatError(ended)


def _look_on(steward: Any) -> str:
    """Print what the steward says; why it ended."""
    known = 0
    while True:
        with suppress(ActorUnavailableError):  # it is started again
            told = _ask(steward, known)
            for line in told.lines:
                print(line, flush=True)
            known = told.count
            if told.ended is not None:
                ray.kill(steward)
                return told.ended
        time.sleep(LOOK_SECONDS)


def _ask(steward: Any, known: int) -> Told:
    try:
        told: Told = ray.get(steward.read.remote(known))
    except ActorDiedError as error:
        raise HeliostatError(
            "the process that tries the candidate out is gone for good, as when the cluster was "
            "stopped: `heliostat deployments` shows what is served"
        ) from error
    return told
