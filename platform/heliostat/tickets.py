"""The queue's one board in the bucket: who runs and who waits, changed by conditional puts alone.

Beside it each ticket has an object that its owner writes anew every few seconds. No clock is
compared with another: who wants a dead one's place watches whether that object still changes.
"""

import json
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from heliostat.errors import HeliostatError
from heliostat.queue import Decision, Room, Run, Ticket, Wait, decide
from heliostat.storage import Conflict, Missing, Store
from heliostat.storage.documents import Damaged, read_document

TOP = "queue"
RENEW_SECONDS = 4.0
DEAD_SECONDS = 15.0  # without one renewal: its owner had time for three
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.02, 2.0
CHANCE = random.SystemRandom()  # not the shared generator, which a training run seeds


@dataclass(frozen=True)
class Board:
    """All tickets of a cluster, and the place in the row that the next one gets."""

    tickets: tuple[Ticket, ...] = ()
    arrivals: int = 0

    def find(self, ticket: str) -> Ticket | None:
        return next((one for one in self.tickets if one.id == ticket), None)

    def put(self, ticket: Ticket) -> "Board":
        """With this ticket in the place of the one that has its id, else at the end."""
        if not self.find(ticket.id):
            return replace(self, tickets=(*self.tickets, ticket))
        tickets = tuple(ticket if one.id == ticket.id else one for one in self.tickets)
        return replace(self, tickets=tickets)

    def remove(self, *tickets: str) -> "Board":
        return replace(self, tickets=tuple(one for one in self.tickets if one.id not in tickets))


# What room there is for those on the board.
Measure = Callable[[Board], Room]


class Stand:
    """A job in the queue of `cluster`; but for `renew` not to be used by two threads at once.

    Every method raises HeliostatError if the bucket cannot be reached.
    """

    def __init__(
        self,
        store: Store,
        cluster: str,
        ticket: Ticket,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._cluster = store, cluster
        self.ticket = replace(ticket, arrival=-1)
        self._monotonic = monotonic
        self._signs: dict[str, tuple[str, float]] = {}
        self._renewals = 0

    def renew(self) -> None:
        """Show that the owner lives."""
        self._renewals += 1
        self._store.write(_life_key(self._cluster, self.ticket.id), b"%d" % self._renewals)

    def look(self, measure: Measure) -> Decision:
        """What this ticket may do now. Workers that it may have from now on are written down, as is
        its place in the row, at the first time.

        Before it has to wait, or to give something back, those that died are taken off the board.
        """
        if not self._renewals:
            self.renew()
        decision = self._decide(measure)
        if not isinstance(decision, Run) and self._bury():
            decision = self._decide(measure)
        return decision

    def hold(self, workers: int) -> None:
        """Say that it has no more than so many workers now; with 0 it waits."""
        self._change(lambda board: self._update(board, workers))

    def leave(self) -> None:
        self._change(lambda board: board.remove(self.ticket.id))
        self._store.delete(_life_key(self._cluster, self.ticket.id))

    def _decide(self, measure: Measure) -> Decision:
        decision: Decision = Wait("")

        def follow(board: Board) -> Board:
            nonlocal decision
            board = self._enter(board)
            decision = decide(board.tickets, measure(board))[self.ticket.id]
            return self._update(board, decision.workers) if isinstance(decision, Run) else board

        self._change(follow)
        return decision

    def _enter(self, board: Board) -> Board:
        """With this ticket: at the end if it is new, in its place if it was taken off."""
        if board.find(self.ticket.id):
            return board
        if self.ticket.arrival < 0:
            self.ticket = replace(self.ticket, arrival=board.arrivals)
        arrivals = max(board.arrivals, self.ticket.arrival + 1)
        return replace(board, arrivals=arrivals).put(self.ticket)

    def _update(self, board: Board, workers: int) -> Board:
        self.ticket = replace(self.ticket, held=workers)
        return board.put(self.ticket)

    def _bury(self) -> bool:
        """Take off the board whose object has not changed for DEAD_SECONDS; whether there were."""
        now = self._monotonic()
        prefix = _life_key(self._cluster, "")
        found = {entry.key.removeprefix(prefix): entry.etag for entry in self._store.list(prefix)}
        standing = {one.id for one in read_board(self._store, self._cluster).tickets}
        for ticket in standing:
            sign = found.get(ticket, "")
            if self._signs.get(ticket, ("", 0.0))[0] != sign or ticket not in self._signs:
                self._signs[ticket] = (sign, now)
        dead = [
            ticket
            for ticket in standing - {self.ticket.id}
            if now - self._signs[ticket][1] >= DEAD_SECONDS
        ]
        if dead:
            self._change(lambda board: board.remove(*dead))
            for ticket in dead:
                self._store.delete(_life_key(self._cluster, ticket))
        return bool(dead)

    def _change(self, change: Callable[[Board], Board]) -> None:
        """Apply `change` to the newest board until nobody has come between."""
        key = _board_key(self._cluster)
        pause_seconds = FIRST_PAUSE_SECONDS
        while True:
            entry = self._store.stat(key)
            before = read_board(self._store, self._cluster) if entry else Board()
            mine = self.ticket
            after = change(before)
            if after == before:
                return
            with suppress(Conflict):
                if entry:
                    self._store.replace(key, _encode(after), entry.etag)
                else:
                    self._store.create(key, _encode(after))
                return
            self.ticket = mine
            time.sleep(CHANCE.uniform(0, pause_seconds))
            pause_seconds = min(2 * pause_seconds, MAX_PAUSE_SECONDS)


def read_board(store: Store, cluster: str) -> Board:
    """Empty where there is none or it is damaged: who runs or waits comes back at its next look."""
    try:
        return read_document(store, _board_key(cluster), Board)
    except (Missing, Damaged):
        return Board()


def keep_alive(stand: Stand, say: Callable[[str], None] = print) -> Callable[[], None]:
    """Renew `stand` for ever, beside what this process does; call what is returned to end it."""
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_SECONDS):
            try:
                stand.renew()
            except HeliostatError as error:
                say(f"the place in the queue could not be renewed: {error}")

    thread = threading.Thread(target=renew, name="queue", daemon=True)
    thread.start()

    def end() -> None:
        ended.set()
        thread.join()

    return end


def _encode(board: Board) -> bytes:
    ordered = sorted(board.tickets, key=lambda one: one.arrival)
    document = {"arrivals": board.arrivals, "tickets": [asdict(one) for one in ordered]}
    return json.dumps(document).encode()


def _board_key(cluster: str) -> str:
    return f"{TOP}/{cluster}/board.json"


def _life_key(cluster: str, ticket: str) -> str:
    return f"{TOP}/{cluster}/alive/{ticket}"
