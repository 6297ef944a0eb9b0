"""A replica's desk: lets in what was leased, tells what was used once, and outlives its office."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest

from heliostat.keys import Key, Limits
from heliostat.serve import desk as module
from heliostat.serve.desk import Away, Desk
from heliostat.serve.ledger import LEASE_SECONDS, Answer, Ask, Ledger, Office
from heliostat.serve.replies import Refusal
from heliostat.usage import Record

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()


@dataclass
class Town:
    """One office in this process and the way there, which a test can close."""

    now: float = 100.0
    taken: list[Record] = field(default_factory=list)
    fault: Callable[[Ask], None] = lambda ask: None
    loses_answers: bool = False
    asked: int = 0

    def __post_init__(self) -> None:
        ledger = Ledger(self.clock, lambda: NOON, self.now - 100, self.count_used)
        self.office = Office(ledger, self.take)

    def clock(self) -> float:
        return self.now

    def count_used(self, key: str, unit: str, month: str) -> float:
        return sum(record.rows for record in self.taken if record.key == key)

    def take(self, records: Iterable[Record]) -> None:
        self.taken += records

    async def send(self, ask: Ask) -> Answer:
        self.asked += 1
        await asyncio.sleep(0)
        self.fault(ask)
        answer = self.office.answer(ask)
        if self.loses_answers:
            raise Away
        return answer

    def open_desk(self) -> Desk:
        return Desk(self.send, self.clock, lambda: NOON)


def make_key(**limits: float) -> Key:
    return Key(
        id="a" * 16,
        sha256="0" * 64,
        owner="ana",
        models=("*",),
        verbs=("predict",),
        limits=Limits.model_validate(limits),
        created=datetime.fromtimestamp(NOON, UTC),
    )


def make_record(rows: int = 1, tokens: int = 0) -> Record:
    return Record(NOON, "a" * 16, "digits", 1, "/", rows, tokens, 0, 0.0, 200)


def be_away(ask: Ask) -> None:
    raise Away


async def count_admitted(desk: Desk, key: Key, tries: int) -> tuple[int, list[Refusal]]:
    found = await asyncio.gather(*(desk.admit(key) for _ in range(tries)), return_exceptions=True)
    refused = [one for one in found if isinstance(one, Refusal)]
    assert len(refused) + found.count(None) == tries
    return found.count(None), refused


def test_a_key_without_limits_asks_nobody() -> None:
    async def run() -> None:
        assert (await count_admitted(town.open_desk(), make_key(), 100))[0] == 100

    town = Town()
    asyncio.run(run())
    assert town.asked == 0


def test_desks_share_a_limit_and_say_truly_when_to_come_again() -> None:
    async def run() -> None:
        desks, key = [town.open_desk() for _ in range(2)], make_key(requests_per_second=20)
        both = await asyncio.gather(*(count_admitted(desk, key, 50) for desk in desks))
        admitted = sum(count for count, _ in both)
        assert 20 <= admitted <= 20 * (1 + LEASE_SECONDS * len(desks))
        for desk, (_, refused) in zip(desks, both, strict=True):
            wait = {refusal.headers["retry-after"] for refusal in refused}
            assert wait == {"1"}
            assert {refusal.status for refusal in refused} == {429}
            town.now += 1
            await desk.admit(key)

    town = Town()
    asyncio.run(run())


def test_a_refused_key_does_not_keep_the_office_busy() -> None:
    async def run() -> None:
        desk, key = town.open_desk(), make_key(requests_per_second=1)
        await count_admitted(desk, key, 1000)

    town = Town()
    asyncio.run(run())
    assert town.asked < 5


def test_what_is_used_is_told_once_though_answers_are_lost() -> None:
    async def run() -> None:
        desk, key = town.open_desk(), make_key()
        async with desk.open(seconds=0.001):
            for number in range(20):
                town.loses_answers = number % 3 == 0
                desk.record(key, make_record(rows=number))
                await asyncio.sleep(0.002)
            town.loses_answers = False

    town = Town()
    asyncio.run(run())
    assert [record.rows for record in town.taken] == list(range(20))


def test_while_the_office_is_away_a_replica_lets_its_share_in() -> None:
    async def run() -> None:
        desk, other = town.open_desk(), town.open_desk()
        key = make_key(requests_per_second=40)
        await asyncio.gather(desk.admit(key), other.admit(key))
        await desk.close()
        town.now += 10
        town.fault = be_away
        admitted, refused = await count_admitted(desk, key, 200)
        assert 20 <= admitted <= 20 + 2 * 40 * LEASE_SECONDS
        assert refused
        town.now += 10
        assert (await count_admitted(desk, key, 200))[0] >= 20
        town.fault = lambda ask: None
        await desk.close()
        town.now += 10
        await desk.admit(key)

    town = Town()
    asyncio.run(run())


def test_a_budget_goes_on_without_the_office_and_is_settled_afterwards() -> None:
    async def run() -> None:
        desk, key = town.open_desk(), make_key(rows_per_month=100)
        await desk.admit(key)
        town.fault = be_away
        for _ in range(30):
            await desk.admit(key)
            desk.record(key, make_record(rows=5))
            await desk.close()
        town.fault = lambda ask: None
        await desk.close()
        await desk.admit(key)  # on its last lease
        desk.record(key, make_record(rows=5))
        await desk.close()
        assert sum(record.rows for record in town.taken) == 155
        with pytest.raises(Refusal, match="rows per month"):
            await desk.admit(key)

    town = Town()
    asyncio.run(run())


def test_an_office_that_hangs_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(ask: Ask) -> Answer:
        await asyncio.Event().wait()
        raise AssertionError

    async def run() -> None:
        desk = Desk(hang, clock=lambda: now[0], wall=lambda: NOON)
        now[0] += 1
        assert (await count_admitted(desk, make_key(requests_per_second=5), 50))[0] >= 5

    now = [100.0]
    monkeypatch.setattr(module, "ASK_SECONDS", 0.001)
    asyncio.run(run())


def test_tokens_are_charged_when_they_are_known() -> None:
    async def run() -> None:
        desk, key = town.open_desk(), make_key(tokens_per_minute=600)
        await desk.admit(key)
        desk.record(key, make_record(tokens=1200))
        await desk.close()
        with pytest.raises(Refusal) as refused:
            await desk.admit(key)
        assert refused.value.headers["retry-after"] in ("60", "61")
        town.now += 61
        await desk.admit(key)

    town = Town()
    asyncio.run(run())


def test_records_that_nobody_takes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        desk = town.open_desk()
        for _ in range(50):
            desk.record(make_key(), make_record())
        await desk.close()

    town = Town()
    monkeypatch.setattr(module, "MAX_RECORDS", 10)
    asyncio.run(run())
    assert len(town.taken) == 10
