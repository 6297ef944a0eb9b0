"""A run has one live writer: a lease that is renewed while it lives, a number that fences others.

No clock is compared with another: whoever wants the lease watches whether its holder renews it.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

from heliostat.errors import HeliostatError
from heliostat.storage import Conflict, Missing, Store
from heliostat.storage.documents import Damaged, read_document
from heliostat.train import checkpoint

RENEW_SECONDS = 4.0
LOOK_SECONDS = 1.0
LOOKS = 13  # without one renewal: its holder is dead, for it had time for three


@dataclass(frozen=True)
class Owner:
    """Who holds a lease; `term` differs at each renewal, `released` once it was given back."""

    host: str
    pid: int
    job: str
    id: str
    term: int = 0
    released: bool = False

    def __str__(self) -> str:
        if not self.pid:
            return "a writer whose lease is damaged"
        return f"pid {self.pid} on host {self.host}" + (f" (job {self.job})" if self.job else "")


class Superseded(HeliostatError):
    """A later writer has the run."""


UNKNOWN = Owner("", 0, "", "")


@dataclass(frozen=True)
class Lease:
    """The lease of a run as long as its object is the one with `etag`."""

    store: Store
    run: str
    owner: Owner
    etag: str

    def renew(self) -> "Lease":
        """Show that the owner lives.

        Raises:
            Conflict: another has taken the lease.
        """
        return self._put(replace(self.owner, term=self.owner.term + 1))

    def release(self) -> None:
        """Give the lease back, if it was not taken: the next one need not wait."""
        with contextlib.suppress(Conflict):
            self._put(replace(self.owner, released=True))

    def _put(self, owner: Owner) -> "Lease":
        etag = self.store.replace(_lease_key(self.run), _encode(owner), self.etag)
        return replace(self, owner=owner, etag=etag)


def acquire(
    store: Store,
    run: str,
    *,
    job: str = "",
    wait: Callable[[float], object] = time.sleep,
    say: Callable[[str], None] = print,
) -> Lease:
    """Take the lease of `run`: at once if it is free, after a while if its holder is dead.

    Raises:
        HeliostatError: its holder lives; names it.
    """
    owner = Owner(socket.gethostname(), os.getpid(), job, secrets.token_hex(8))
    etag, holder = first, _ = _look(store, run)
    for look in range(LOOKS):
        if holder.released or look == LOOKS - 1:
            with contextlib.suppress(Conflict):
                return _take(store, run, owner, etag)
        elif look == 0:
            seconds = LOOKS * LOOK_SECONDS
            say(f"run {run} was not ended by {holder}: looking {seconds:g} s for a sign of life")
        wait(LOOK_SECONDS)
        etag, holder = _look(store, run)
        if etag != first and not holder.released:
            break
    raise HeliostatError(
        f"run {run} is being written by {holder}: stop that job, or choose another train.run"
    )


@contextlib.contextmanager
def hold(
    store: Store,
    run: str,
    *,
    job: str = "",
    period_seconds: float = RENEW_SECONDS,
    say: Callable[[str], None] = print,
) -> Iterator[None]:
    """Hold the lease of `run` within: renewed by a thread, given back at the end.

    Should another take it nevertheless, `Fence.check` is what stops this one's writers.

    Raises:
        HeliostatError: another holds it; names them.
    """
    lease = acquire(store, run, job=job, say=say)
    ended = threading.Event()

    def renew() -> None:
        nonlocal lease
        while not ended.wait(period_seconds):
            try:
                lease = lease.renew()
            except Conflict:
                say(f"run {run} was taken over by {_look(store, run)[1]}")
                return
            except HeliostatError as error:
                say(f"the lease of run {run} could not be renewed: {error}")

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        lease.release()


@dataclass(frozen=True)
class Fence:
    """The number of a writer among all that ever wrote the run; only the highest may commit."""

    store: Store
    run: str
    number: int

    def check(self) -> None:
        """Raises Superseded if another writer has followed this one."""
        if (newest := _read_fence(self.store, self.run)) != self.number:
            raise Superseded(
                f"run {self.run} has a later writer (number {newest}, this is {self.number}): "
                "this one commits nothing any more"
            )


def raise_fence(store: Store, run: str) -> Fence:
    """A new writer's fence. Rank 0 calls it before it looks for a checkpoint to go on from."""
    while True:
        entry = store.stat(_fence_key(run))
        number = _read_fence(store, run) + 1
        data = str(number).encode()
        with contextlib.suppress(Conflict):
            if entry:
                store.replace(_fence_key(run), data, entry.etag)
            else:
                store.create(_fence_key(run), data)
            return Fence(store, run, number)


def _read_fence(store: Store, run: str) -> int:
    """The highest number of a writer; if it is lost, of those that checkpoints are named by."""
    with contextlib.suppress(Missing, ValueError):
        if 0 <= (number := int(store.read(_fence_key(run)))) <= checkpoint.MAX_FENCE:
            return number
    return max((found.fence for found in checkpoint.find(store, run)), default=0)


def _look(store: Store, run: str) -> tuple[str, Owner]:
    """The etag of the lease and who holds it; a lease that never was counts as given back.

    Whoever holds a damaged one is not known, and may live.
    """
    entry = store.stat(_lease_key(run))
    if entry is None:
        return "", replace(UNKNOWN, released=True)
    try:
        return entry.etag, read_document(store, _lease_key(run), Owner)
    except Damaged:
        return entry.etag, UNKNOWN


def _take(store: Store, run: str, owner: Owner, etag: str) -> Lease:
    key, data = _lease_key(run), _encode(owner)
    return Lease(
        store, run, owner, store.replace(key, data, etag) if etag else store.create(key, data)
    )


def _encode(owner: Owner) -> bytes:
    return json.dumps(asdict(owner)).encode()


def _lease_key(run: str) -> str:
    return f"runs/{run}/lease.json"


def _fence_key(run: str) -> str:
    return f"runs/{run}/fence"
