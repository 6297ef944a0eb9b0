"""How much a key may still use, counted over all replicas, which lease a little in advance.

In any T seconds all replicas together let in at most what a limit gives in one period and in T,
and one lease each. What a request costs beyond its first unit is known when it ends: it is a debt,
which those that follow it pay.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from heliostat.keys import Allowance
from heliostat.usage import Record

LEASE_SECONDS = 0.25  # of what a limit gives go into one lease
LEASE_SHARE = 0.001  # and of a month's budget; at least one unit
SEEN_SECONDS = 15.0  # a replica that has not asked for so long is gone

Clock = Callable[[], float]


@dataclass(frozen=True)
class Want:
    """A replica's wish for a lease; it still holds `left` units, or owes them."""

    allowance: Allowance
    left: float


@dataclass(frozen=True)
class Grant:
    """What to add to `left`. If that is below one unit, `wait` seconds are until there may be."""

    units: float
    wait: float


@dataclass(frozen=True)
class Ask:
    """What a replica has to say: its wishes, and the `number`-th batch of what was used there."""

    replica: str
    wants: tuple[Want, ...]
    number: int
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Answer:
    """A grant for each wish, in their order, and how many replicas there are."""

    grants: tuple[Grant, ...]
    replicas: int


@dataclass
class Rate:
    """A bucket that fills at `rate` units a second, up to `size`; debts make it wait below zero."""

    size: float
    rate: float
    lease: float
    clock: Clock
    at: float
    level: float = 0.0

    def grant(self, replica: str, left: float) -> Grant:
        now = self.clock()
        self.level, self.at = min(self.size, self.level + (now - self.at) * self.rate), now
        debt, held = max(0.0, -left), max(0.0, left)
        self.level -= debt
        if self.level < 1 - held:
            return Grant(debt, (1 - held - self.level) / self.rate)
        given = min(self.level, max(0.0, self.lease - held))
        self.level -= given
        return Grant(debt + given, 0.0)

    def forget(self, replica: str) -> None:
        """What it held is lost: it may have used that."""


@dataclass
class Budget:
    """The units of a calendar month. What was used is told by records, a debt with them."""

    size: float
    lease: float
    wall: Clock
    used: Callable[[str], float]
    held: dict[str, float] = field(default_factory=dict)

    def grant(self, replica: str, left: float) -> Grant:
        now = self.wall()
        self.held.pop(replica, None)
        rest = self.size - self.used(month_of(now)) - sum(self.held.values())
        holds = min(rest, self.lease) if rest >= 1 else 0.0
        self.held[replica] = holds
        return Grant(holds - left, 0.0 if holds else seconds_to_next_month(now))

    def forget(self, replica: str) -> None:
        self.held.pop(replica, None)


@dataclass
class Ledger:
    """The accounts of all keys; `clock` is monotonic, `wall` the time of day, both in seconds.

    An account that is seen first has filled since `born` and not before, so that a ledger which was
    killed and started again gives nothing twice. `share` is the part of each limit that it gives.
    """

    clock: Clock
    wall: Clock
    born: float
    used: Callable[[str, str, str], float] = lambda key, unit, month: 0.0
    share: float = 1.0
    accounts: dict[str, Rate | Budget] = field(default_factory=dict)

    def grant(self, replica: str, want: Want) -> Grant:
        account = want.allowance.account
        if account not in self.accounts:
            self.accounts[account] = self._open(want.allowance)
        return self.accounts[account].grant(replica, want.left)

    def forget(self, replica: str) -> None:
        for account in self.accounts.values():
            account.forget(replica)

    def _open(self, allowance: Allowance) -> Rate | Budget:
        units, lease = allowance.units * self.share, find_lease(allowance)
        if allowance.seconds:
            rate = units / allowance.seconds
            return Rate(max(1.0, units), rate, lease, self.clock, self.born)
        return Budget(
            units,
            lease,
            self.wall,
            lambda month: self.used(allowance.key_id, allowance.unit, month),
        )


@dataclass
class Office:
    """What the one process does that all replicas ask: grants, and takes each batch once."""

    ledger: Ledger
    take: Callable[[Iterable[Record]], None]
    seen: dict[str, float] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)

    def answer(self, ask: Ask) -> Answer:
        now = self.ledger.clock()
        if ask.number > self.taken.get(ask.replica, 0):
            self.take(ask.records)
            self.taken[ask.replica] = ask.number
        self.seen[ask.replica] = now
        for replica in [one for one, at in self.seen.items() if now - at > SEEN_SECONDS]:
            del self.seen[replica]
            self.ledger.forget(replica)
        grants = tuple(self.ledger.grant(ask.replica, want) for want in ask.wants)
        return Answer(grants, len(self.seen))


def find_lease(allowance: Allowance) -> float:
    """How many units a replica holds in advance, at most."""
    if allowance.seconds:
        return max(1.0, allowance.units / allowance.seconds * LEASE_SECONDS)
    return max(1.0, allowance.units * LEASE_SHARE)


def month_of(seconds: float) -> str:
    """`2026-11`, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m")


def seconds_to_next_month(seconds: float) -> float:
    now = datetime.fromtimestamp(seconds, UTC)
    year, month = divmod(now.year * 12 + now.month, 12)
    return datetime(year, month + 1, 1, tzinfo=UTC).timestamp() - seconds
