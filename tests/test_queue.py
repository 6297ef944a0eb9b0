"""The laws of the queue: no over-commitment, priority, no starvation, the same for any order."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.queue import Amount, Decision, Room, Run, Shrink, Ticket, Wait, Yield, decide

NODE = Amount(8, 2)
ROOM = Room((NODE, NODE))
BESIDE = Amount(1)


@st.composite
def draw_tickets(draw: st.DrawFn) -> list[Ticket]:
    count = draw(st.integers(1, 7))
    arrivals = draw(st.permutations(range(count)))
    tickets = []
    for index in range(count):
        fewest = draw(st.integers(1, 5))
        most = fewest + draw(st.integers(0, 4))
        tickets.append(
            Ticket(
                f"t{index}",
                arrivals[index],
                f"run {index}",
                Amount(draw(st.integers(1, 4)), draw(st.integers(0, 1))),
                BESIDE,
                fewest,
                most,
                draw(st.integers(-2, 2)),
            )
        )
    return tickets


def follow(tickets: list[Ticket], decisions: dict[str, Decision]) -> list[Ticket]:
    """Each does what it was told."""
    followed = []
    for ticket in tickets:
        match decisions[ticket.id]:
            case Run(workers) | Shrink(workers):
                followed.append(replace(ticket, held=workers))
            case _:
                followed.append(replace(ticket, held=0))
    return followed


def admit_only(tickets: list[Ticket], decisions: dict[str, Decision]) -> list[Ticket]:
    """Who is to give back does not yet."""
    return [
        replace(one, held=decision.workers) if isinstance(decision, Run) else one
        for one in tickets
        if (decision := decisions[one.id])
    ]


def settle(tickets: list[Ticket], room: Room) -> list[Ticket]:
    for _ in range(50):
        after = follow(tickets, decide(tickets, room))
        if after == tickets:
            return tickets
        tickets = after
    raise AssertionError("it never settles")


def sum_held(tickets: list[Ticket]) -> Amount:
    return sum((one.need(one.held) for one in tickets), Amount())


def is_possible(ticket: Ticket, room: Room) -> bool:
    places = room.count_places(ticket.worker) >= ticket.fewest
    return places and room.total.holds(ticket.need(ticket.fewest))


@given(draw_tickets(), st.randoms(use_true_random=False))
def test_what_is_given_out_never_exceeds_the_room(
    coming: list[Ticket], chance: random.Random
) -> None:
    """Whoever comes and ends when, and however slowly those follow that are to give back."""
    coming, there = sorted(coming, key=lambda one: one.arrival), list[Ticket]()
    for _ in range(20):
        if coming and chance.random() < 0.5:
            there.append(coming.pop(0))
        act = chance.choice([follow, admit_only, admit_only])
        there = act(there, decide(there, ROOM))
        assert ROOM.total.holds(sum_held(there))
        for one in there:
            assert one.held == 0 or one.fewest <= one.held <= one.most
        if there and chance.random() < 0.1:
            there.remove(chance.choice(there))


@given(draw_tickets())
def test_no_ticket_waits_for_one_of_lower_priority(tickets: list[Ticket]) -> None:
    tickets = settle(tickets, ROOM)
    for waiting in (one for one in tickets if not one.held and is_possible(one, ROOM)):
        above = [one for one in tickets if one.priority >= waiting.priority and one.held]
        fewest = sum((one.need(one.fewest) for one in above), Amount())
        passed = [
            one for one in tickets
            if not one.held and one.priority == waiting.priority and one.arrival < waiting.arrival
            and is_possible(one, ROOM)
        ]  # fmt: skip
        assert passed or not (ROOM.total - fewest).holds(waiting.need(waiting.fewest))


@given(draw_tickets())
def test_every_possible_ticket_is_admitted_when_others_end(tickets: list[Ticket]) -> None:
    left = [one for one in tickets if is_possible(one, ROOM)]
    while left:
        left = settle(left, ROOM)
        running = [one for one in left if one.held]
        assert running
        left.remove(running[-1])


@given(draw_tickets(), st.randoms(use_true_random=False))
def test_the_same_tickets_in_any_order_are_decided_alike(
    tickets: list[Ticket], chance: random.Random
) -> None:
    tickets = follow(tickets, decide(tickets, ROOM))
    shuffled = tickets[:]
    chance.shuffle(shuffled)
    assert decide(tickets, ROOM) == decide(shuffled, ROOM)


def make(name: str, arrival: int, workers: int, **changes: object) -> Ticket:
    ticket = Ticket(name, arrival, name, Amount(2), fewest=workers, most=workers)
    return replace(ticket, **changes)  # type: ignore[arg-type]


def test_small_ones_never_starve_a_large_one() -> None:
    """A stream of small ones, more than enough to fill every gap that one of them leaves."""
    there = [make(f"small {arrival}", arrival, 2, held=2) for arrival in range(4)]
    there.append(make("large", 4, 6))
    for arrival in range(5, 45, 4):
        there += [make(f"small {number}", number, 1) for number in range(arrival, arrival + 4)]
        there = settle(there, ROOM)
        running = [one for one in there if one.held]
        if any(one.id == "large" for one in running):
            return
        there.remove(running[0])
    raise AssertionError("the large one never came in")


def test_what_is_left_goes_to_a_lower_priority_which_gives_it_back() -> None:
    first, large = make("first", 0, 4, held=4), make("large", 1, 6)
    low = make("low", 2, 2, priority=-1)
    assert decide([first, large, low], ROOM)["low"] == Run(2)
    running = [large, replace(low, held=2)]
    now = decide(running, ROOM)
    assert now == {"large": Run(6), "low": Run(2)}  # 16 CPU: both fit
    smaller = decide(running, Room((NODE, Amount(4))))
    assert smaller["low"] == Yield("large (priority 0) needs the room")
    assert smaller["large"] == Wait("low (priority -1) saves, and makes room for it")


def test_an_elastic_one_shrinks_as_far_as_it_must_and_grows_back() -> None:
    elastic = Ticket("e", 0, "e", Amount(2), fewest=1, most=8, held=8)
    high = make("high", 1, 5, priority=5)
    first = decide([elastic, high], ROOM)
    assert first["e"] == Shrink(3, "high (priority 5) needs the room")
    assert first["high"] == Wait("e (priority 0) saves, and makes room for it")
    shrunk = replace(elastic, held=3)
    assert decide([shrunk, high], ROOM) == {"e": Run(3), "high": Run(5)}
    assert decide([shrunk], ROOM) == {"e": Run(8)}


def test_a_ticket_without_room_names_who_has_it() -> None:
    running, waits = make("big", 0, 7, held=7), make("late", 1, 2)
    told = decide([running, waits, make("later", 2, 1)], ROOM)
    assert told["late"] == Wait(
        "it needs 2 x 2 CPU, 2 CPU and 4 GPU left: big (priority 0) has 14 CPU"
    )
    assert told["later"] == Wait("it comes after late (priority 0), which waits as well")


def test_what_never_fits_holds_up_nobody() -> None:
    told = decide([make("huge", 0, 9), make("small", 1, 1)], ROOM)
    assert isinstance(told["huge"], Wait)
    assert "9 x 2 CPU, and the cluster has 16 CPU and 4 GPU" in told["huge"].reason
    assert told["small"] == Run(1)


def test_served_models_go_first() -> None:
    running = make("run", 0, 4, held=4)
    assert decide([running], Room((NODE,), Amount(0))) == {"run": Run(4)}
    assert decide([running], Room((NODE,), Amount(2))) == {
        "run": Yield("the cluster has become too small")
    }


@pytest.mark.parametrize("held", [0, 2])
def test_a_worker_that_fits_no_node_is_not_admitted_by_the_sum(held: int) -> None:
    wide = Ticket("w", 0, "w", Amount(5), fewest=3, most=3, held=held)
    assert isinstance(decide([wide], ROOM)["w"], Wait | Yield)
