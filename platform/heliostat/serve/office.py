"""The office on Ray: one process for all replicas, which grants leases and keeps what was used."""

import asyncio
import logging
import time

import ray
from ray.exceptions import ActorDiedError, RayError

from heliostat.errors import HeliostatError
from heliostat.keys import make_clock
from heliostat.serve.desk import Away, Send
from heliostat.serve.ledger import Answer, Ask, Ledger, Office
from heliostat.storage import connect
from heliostat.usage import Meter

logger = logging.getLogger(__name__)

NAMESPACE = "heliostat"
FLUSH_SECONDS = 3.0  # with the second in which replicas report: no request is unwritten for 5 s
IDLE_SECONDS = 600.0  # without one question: no replica is left
# A head outlives the spot nodes, and a node that is not one has none of this resource.
ON_HEAD = {"node:__internal_head__": 0.001}


class Clerk:
    """The actor: an office, and a flush every few seconds of its life."""

    def __init__(self, root: str) -> None:
        self._meter = Meter(connect(root))
        ledger = Ledger(time.monotonic, make_clock(), time.monotonic(), self._meter.count_used)
        self._office = Office(ledger, self._meter.add)
        self._heard = time.monotonic()
        self._flushing: asyncio.Future[None] | None = None

    async def answer(self, ask: Ask) -> Answer:
        self._heard = time.monotonic()
        self._flushing = self._flushing or asyncio.ensure_future(self._flush())
        return self._office.answer(ask)

    async def _flush(self) -> None:
        while time.monotonic() - self._heard < IDLE_SECONDS:
            await asyncio.sleep(FLUSH_SECONDS)
            try:
                await asyncio.to_thread(self._meter.flush)
            except HeliostatError as error:
                logger.error("usage waits to be written: %s", error)
        ray.kill(ray.get_runtime_context().current_actor)


def reach_office(root: str) -> Send:
    """How this process asks the office of the bucket `root`, which is started if there is none.

    It is started by a replica and so imports the package from the bucket, as replicas do.
    """
    office = _find_office(root)

    async def send(ask: Ask) -> Answer:
        nonlocal office
        try:
            office = office or await asyncio.to_thread(_find_office, root)
            answer: Answer = await office.answer.remote(ask)
        except RayError as error:
            office = None if isinstance(error, ActorDiedError) else office
            raise Away from error
        return answer

    return send


def _find_office(root: str) -> "ray.actor.ActorHandle":
    options = {
        "name": f"office of {root}",
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "num_cpus": 0,
        "resources": ON_HEAD,
    }
    return ray.remote(Clerk).options(**options).remote(root)
