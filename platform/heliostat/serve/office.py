"""The office on Ray: one process for all replicas, which grants leases and keeps what was used."""

import asyncio
import logging
import time
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError

from heliostat.errors import HeliostatError
from heliostat.keys import make_clock
from heliostat.serve.desk import Away
from heliostat.serve.ledger import Answer, Ask, Ledger, Office
from heliostat.serve.receipts import Question, Receipt, Receipts, Standing
from heliostat.storage import connect
from heliostat.usage import Meter

logger = logging.getLogger(__name__)

NAMESPACE = "heliostat"
FLUSH_SECONDS = 3.0  # with the second in which replicas report: no request is unwritten for 5 s
IDLE_SECONDS = 600.0  # without one question: no replica is left
# A head outlives the spot nodes, and a node that is not one has none of this resource.
ON_HEAD = {"node:__internal_head__": 0.001}


class Clerk:
    """The actor: an office, the receipts of all replicas, and a flush every few seconds."""

    def __init__(self, root: str) -> None:
        self._meter = Meter(connect(root))
        ledger = Ledger(time.monotonic, make_clock(), time.monotonic(), self._meter.count_used)
        self._office = Office(ledger, self._meter.add)
        self._receipts = Receipts(time.monotonic)
        self._heard = time.monotonic()
        self._flushing: asyncio.Future[None] | None = None

    async def answer(self, ask: Ask) -> Answer:
        self._heard = time.monotonic()
        self._flushing = self._flushing or asyncio.ensure_future(self._flush())
        return self._office.answer(ask)

    async def claim(self, question: Question, claimant: str) -> Standing:
        return self._receipts.claim(question, claimant)

    async def settle(self, question: Question, claimant: str, receipt: Receipt | None) -> None:
        self._receipts.settle(question, claimant, receipt)

    async def _flush(self) -> None:
        while time.monotonic() - self._heard < IDLE_SECONDS:
            await asyncio.sleep(FLUSH_SECONDS)
            try:
                await asyncio.to_thread(self._meter.flush)
            except HeliostatError as error:
                logger.error("usage waits to be written: %s", error)
        ray.kill(ray.get_runtime_context().current_actor)


class Line:
    """How this process asks the office of the bucket `root`, which is started if there is none.

    It is started by a replica and so imports the package from the bucket, as replicas do.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._office: Any = _find_office(root)

    async def send(self, ask: Ask) -> Answer:
        answer: Answer = await self._call("answer", ask)
        return answer

    async def claim(self, question: Question, claimant: str) -> Standing:
        standing: Standing = await self._call("claim", question, claimant)
        return standing

    async def settle(self, question: Question, claimant: str, receipt: Receipt | None) -> None:
        await self._call("settle", question, claimant, receipt)

    async def _call(self, method: str, *arguments: object) -> Any:
        """Raises Away: the office does not answer now."""
        try:
            self._office = self._office or await asyncio.to_thread(_find_office, self._root)
            return await getattr(self._office, method).remote(*arguments)
        except RayError as error:
            self._office = None if isinstance(error, ActorDiedError) else self._office
            raise Away from error


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
