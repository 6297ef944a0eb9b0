"""Which trainings run, and on how many workers: a pure policy over tickets and room.

Of higher priority first; of the same, what runs before what waits, then by arrival. What waits is
not passed by another of its priority, so that many small ones never starve a large one. One of
lower priority may take what is left, because it gives it back when it is asked to.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

NAMED = 3
EPSILON = 1e-6  # of a CPU or GPU; they are added and taken away as floats


@dataclass(frozen=True)
class Amount:
    cpus: float = 0.0
    gpus: float = 0.0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.cpus + other.cpus, self.gpus + other.gpus)

    def __sub__(self, other: "Amount") -> "Amount":
        return Amount(self.cpus - other.cpus, self.gpus - other.gpus)

    def __mul__(self, count: int) -> "Amount":
        return Amount(self.cpus * count, self.gpus * count)

    def holds(self, other: "Amount") -> bool:
        return self.cpus + EPSILON >= other.cpus and self.gpus + EPSILON >= other.gpus

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU" + f" and {self.gpus:g} GPU" * bool(self.gpus)


NOTHING = Amount()


@dataclass(frozen=True)
class Ticket:
    """A training that runs or waits, with `arrival` as its place in the row.

    It takes `fewest` to `most` workers, `worker` each, and `beside` once. It may use `held` of them
    now, none while it waits.
    """

    id: str
    arrival: int
    what: str
    worker: Amount
    beside: Amount = NOTHING
    fewest: int = 1
    most: int = 1
    priority: int = 0
    team: str | None = None
    held: int = 0

    def need(self, workers: int) -> Amount:
        return self.worker * workers + self.beside if workers else NOTHING

    def __str__(self) -> str:
        return f"{self.what} (priority {self.priority})"


@dataclass(frozen=True)
class Room:
    """What the nodes have, and what others hold of it: served models, other programs."""

    nodes: tuple[Amount, ...]
    others: Amount = NOTHING

    @property
    def total(self) -> Amount:
        return sum(self.nodes, NOTHING) - self.others

    def count_places(self, worker: Amount) -> int:
        """How many workers of this shape the nodes would hold if they were empty."""
        return sum(_count_in(node, worker) for node in self.nodes)


@dataclass(frozen=True)
class Run:
    """It may have so many workers, from now on."""

    workers: int


@dataclass(frozen=True)
class Wait:
    reason: str


@dataclass(frozen=True)
class Shrink:
    """It is to save and to go on with so many workers."""

    workers: int
    reason: str


@dataclass(frozen=True)
class Yield:
    """It is to save, to end, and to wait again."""

    reason: str


Decision = Run | Wait | Shrink | Yield


@dataclass
class _Plan:
    """How many workers each ticket is to have in the end, and why one has none."""

    left: Amount
    targets: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    blocked: dict[int, Ticket] = field(default_factory=dict)  # by priority


def decide(tickets: Iterable[Ticket], room: Room) -> dict[str, Decision]:
    """What each ticket may do now, by its id.

    What is given out never exceeds the room, nor does it count on what others are only asked to
    give back: `held` says when they have.
    """
    row = sorted(tickets, key=lambda one: (-one.priority, one.held == 0, one.arrival))
    plan = _Plan(room.total)
    for ticket in row:
        _place(ticket, row, room, plan)
    for ticket in row:
        _extend(ticket, room, plan)
    free = room.total - sum((ticket.need(ticket.held) for ticket in row), NOTHING)
    decisions = {}
    for ticket in row:
        decisions[ticket.id] = decision = _step(ticket, row, plan, free)
        if isinstance(decision, Run):
            free -= ticket.need(decision.workers) - ticket.need(ticket.held)
    return decisions


def _place(ticket: Ticket, row: Sequence[Ticket], room: Room, plan: _Plan) -> None:
    """Its fewest workers, if they fit what those before it leave."""
    plan.targets[ticket.id] = 0
    need = ticket.need(ticket.fewest)
    if not room.total.holds(need) or room.count_places(ticket.worker) < ticket.fewest:
        plan.reasons[ticket.id] = _say_impossible(ticket, room)
    elif ticket.held == 0 and (before := plan.blocked.get(ticket.priority)):
        plan.reasons[ticket.id] = f"it comes after {before}, which waits as well"
    elif plan.left.holds(need):
        plan.targets[ticket.id] = ticket.fewest
        plan.left -= need
    else:
        plan.blocked.setdefault(ticket.priority, ticket)
        plan.reasons[ticket.id] = _say_full(ticket, row, room, plan)


def _extend(ticket: Ticket, room: Room, plan: _Plan) -> None:
    """As many more workers as fit; while others wait, one that runs does not grow for a while."""
    if not plan.targets[ticket.id]:
        return
    most = min(ticket.most, room.count_places(ticket.worker))
    if plan.blocked and ticket.held:
        most = min(most, max(ticket.held, ticket.fewest))
    more = min(most - ticket.fewest, _count_in(plan.left, ticket.worker))
    plan.targets[ticket.id] += more
    plan.left -= ticket.worker * more


def _step(ticket: Ticket, row: Sequence[Ticket], plan: _Plan, free: Amount) -> Decision:
    """What to do now on the way to its target, with what is free already."""
    target = plan.targets[ticket.id]
    if ticket.held > target:
        reason = _say_who_needs(ticket, row, plan)
        return Shrink(target, reason) if target else Yield(reason)
    if not target:
        return Wait(plan.reasons[ticket.id])
    least = ticket.held or ticket.fewest
    held = ticket.need(ticket.held)
    for workers in range(target, least - 1, -1):
        if workers == ticket.held or free.holds(ticket.need(workers) - held):
            return Run(workers)
    return Wait(_say_who_saves(ticket, row, plan))


def _say_impossible(ticket: Ticket, room: Room) -> str:
    places = room.count_places(ticket.worker)
    others = f", of which others hold {room.others}" if room.others != NOTHING else ""
    return (
        f"it needs {_say_need(ticket)}, and the cluster has {sum(room.nodes, NOTHING)}{others}, "
        f"with places for {places} such workers: it waits until that changes"
    )


def _say_full(ticket: Ticket, row: Sequence[Ticket], room: Room, plan: _Plan) -> str:
    running = [one for one in row if plan.targets.get(one.id) and one.id != ticket.id]
    told = [f"{one} has {one.need(plan.targets[one.id])}" for one in running]
    others = [f"others have {room.others}"] if room.others != NOTHING else []
    return f"it needs {_say_need(ticket)}, {plan.left} left: {_join([*told, *others])}"


def _say_who_needs(ticket: Ticket, row: Sequence[Ticket], plan: _Plan) -> str:
    takers = [str(one) for one in row if plan.targets[one.id] > one.held]
    return f"{_join(takers)} needs the room" if takers else "the cluster has become too small"


def _say_who_saves(ticket: Ticket, row: Sequence[Ticket], plan: _Plan) -> str:
    givers = [str(one) for one in row if plan.targets[one.id] < one.held]
    return f"{_join(givers) or 'another'} saves, and makes room for it"


def _say_need(ticket: Ticket) -> str:
    beside = f" and {ticket.beside} beside them" if ticket.beside != NOTHING else ""
    return f"{ticket.fewest} x {ticket.worker}{beside}"


def _join(parts: Sequence[str]) -> str:
    more = len(parts) - NAMED
    return ", ".join(parts[:NAMED]) + f" and {more} more" * (more > 0)


def _count_in(amount: Amount, worker: Amount) -> int:
    parts = ((amount.cpus, worker.cpus), (amount.gpus, worker.gpus))
    counts = [int((have + EPSILON) // each) for have, each in parts if each]
    return max(0, min(counts, default=10**6))


def list_places(tickets: Iterable[Ticket]) -> Iterator[tuple[int, Ticket]]:
    """The tickets that wait with their places in the row, the next one first, from 1."""
    waiting = (one for one in tickets if not one.held)
    ordered = sorted(waiting, key=lambda one: (-one.priority, one.arrival))
    yield from enumerate(ordered, start=1)
