"""Where a replica keeps account of its keys: what it may let in, and what has been used."""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from heliostat.keys import Allowance, Key
from heliostat.serve.ledger import Answer, Ask, Clock, Ledger, Want, find_lease
from heliostat.serve.replies import Refusal
from heliostat.usage import UNITS, Record, count

logger = logging.getLogger(__name__)

REPORT_SECONDS = 1.0
ASK_SECONDS = 0.5
START_SECONDS = 30.0  # the first time, for the office may only just be starting
MAX_RECORDS = 200_000  # that wait for an office that is away; what comes then is not recorded
ONE = 1 - 1e-6  # a unit, whatever was lost by rounding

Send = Callable[[Ask], Awaitable[Answer]]


class Away(Exception):
    """The office cannot be reached now."""


@dataclass(frozen=True)
class Batch:
    """Records on their way: sent again as they are until the office has confirmed them."""

    number: int
    records: tuple[Record, ...]


class Desk:
    """Lets requests in on what was leased from the office, which `send` reaches, and reports there.

    While the office is away, a replica gives its own keys the share of one among the replicas that
    there were last. A month's budget that was not used up then goes on, and is settled afterwards.
    """

    def __init__(
        self, send: Send, clock: Clock = time.monotonic, wall: Clock = time.time, replicas: int = 1
    ) -> None:
        self._send, self._clock, self._wall = send, clock, wall
        self._name = secrets.token_hex(8)
        self._left: dict[str, float] = {}
        self._closed: dict[str, float] = {}
        self._wanted: dict[str, Allowance] = {}
        self._records: list[Record] = []
        self._batch = Batch(0, ())
        self._asking: asyncio.Future[None] | None = None
        self._replicas, self._heard = replicas, clock()
        self._spare: Ledger | None = None
        self._patience = ASK_SECONDS

    async def admit(self, key: Key) -> None:
        """Let one request of `key` in.

        Raises:
            Refusal: 429, its limit is reached; Retry-After is when there may be something again.
        """
        while short := [one for one in key.allowances if self._left.get(one.account, 0.0) < ONE]:
            waits = {one.name: self._closed.get(one.account, 0.0) - self._clock() for one in short}
            name = max(waits, key=waits.__getitem__)
            if waits[name] > 0:
                raise Refusal(
                    429,
                    f"the key has used its {name.replace('_', ' ')}, retry after the time given",
                    headers={"retry-after": str(math.ceil(waits[name]))},
                )
            if self._spare:
                wants = self._list_wants(short)
                self._apply(wants, self._answer_alone(wants))
            else:
                self._wanted.update((one.account, one) for one in short)
                await asyncio.shield(self._ask())
        for one in key.allowances:
            if one.unit == "requests":
                self._pay(one, 1)

    def record(self, key: Key, record: Record) -> None:
        """Take what a request has used into account."""
        if len(self._records) < MAX_RECORDS:
            self._records.append(record)
        for one in key.allowances:
            if one.unit in UNITS:
                self._pay(one, count(record, one.unit))

    @asynccontextmanager
    async def open(self, seconds: float = REPORT_SECONDS) -> AsyncIterator[None]:
        """Report to the office every `seconds` within, and what is left at the end."""

        async def report() -> None:
            while True:
                await asyncio.sleep(seconds)
                await asyncio.shield(self._ask())

        self._patience = START_SECONDS
        await self._ask()
        self._patience = ASK_SECONDS
        reporting = asyncio.ensure_future(report())
        try:
            yield
        finally:
            reporting.cancel()
            await self.close()

    async def close(self) -> None:
        """Report all that there is to report now: what is on its way, and the rest."""
        for _ in range(2):
            await self._ask()

    def _pay(self, allowance: Allowance, units: float) -> None:
        account = allowance.account
        self._left[account] = left = self._left.get(account, 0.0) - units
        if left < find_lease(allowance) / 2 and self._closed.get(account, 0.0) <= self._clock():
            self._wanted[account] = allowance
            self._ask()

    def _ask(self) -> "asyncio.Future[None]":
        """The exchange that runs, or a new one: all who wait meanwhile wait for one answer."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._exchange())
        return self._asking

    async def _exchange(self) -> None:
        wanted, self._wanted = self._wanted, {}
        wants = self._list_wants(wanted.values())
        if not self._batch.records and self._records:
            self._batch = Batch(self._batch.number + 1, tuple(self._records))
            self._records = []
        self._apply(wants, await self._consult(wants))

    def _list_wants(self, allowances: Iterable[Allowance]) -> tuple[Want, ...]:
        return tuple(Want(one, self._left.get(one.account, 0.0)) for one in allowances)

    def _apply(self, wants: tuple[Want, ...], answer: Answer) -> None:
        now = self._clock()
        for want, grant in zip(wants, answer.grants, strict=True):
            account = want.allowance.account
            self._left[account] = self._left.get(account, 0.0) + grant.units
            self._closed[account] = now + grant.wait

    async def _consult(self, wants: tuple[Want, ...]) -> Answer:
        ask = Ask(self._name, wants, self._batch.number, self._batch.records)
        try:
            async with asyncio.timeout(self._patience):
                answer = await self._send(ask)
        except (Away, TimeoutError):
            return self._answer_alone(wants)
        if self._spare:
            logger.warning("the office answers again")
        self._batch = Batch(self._batch.number, ())
        self._replicas, self._heard, self._spare = answer.replicas, self._clock(), None
        return answer

    def _answer_alone(self, wants: tuple[Want, ...]) -> Answer:
        if self._spare is None:
            logger.warning("the office is away: this replica counts alone")
            share = 1 / self._replicas
            self._spare = Ledger(self._clock, self._wall, self._heard, share=share)
        grants = tuple(self._spare.grant(self._name, want) for want in wants)
        return Answer(grants, self._replicas)
