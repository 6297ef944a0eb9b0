"""One live writer a run: who renews keeps the lease, who is dead loses it, no clock is read."""

import threading
from pathlib import Path
from typing import Any

import pytest

from heliostat.errors import HeliostatError
from heliostat.storage import Conflict, LocalStore, Store
from heliostat.train import checkpoint, lease
from heliostat.train.lease import LOOKS, Lease

RUN = "digits-1"


def quiet(_: str) -> None:
    pass


def take(store: Store, wait: Any = None, job: str = "") -> Lease:
    def never(_: float) -> None:
        raise AssertionError("it waited")

    return lease.acquire(store, RUN, job=job, wait=wait or never, say=quiet)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return LocalStore(str(tmp_path))


def test_a_run_that_was_ended_is_taken_at_once(store: Store) -> None:
    for _ in range(3):
        take(store).release()


@pytest.mark.parametrize("renewed_at", range(LOOKS - 1))
def test_a_live_writer_is_never_taken_over(store: Store, renewed_at: int) -> None:
    """Whenever its one renewal comes; the sentence names it."""
    holder = [take(store, job="raysubmit_1")]
    looks = iter(range(LOOKS))

    def wait(_: float) -> None:
        if next(looks) == renewed_at:
            holder.append(holder[-1].renew())

    with pytest.raises(HeliostatError, match=r"pid \d+ on host .+ \(job raysubmit_1\)"):
        take(store, wait)
    holder[-1].renew()


def test_a_dead_writer_is_taken_over_after_a_while_which_is_said(store: Store) -> None:
    dead = take(store)
    waits: list[float] = []
    said: list[str] = []
    taken = lease.acquire(store, RUN, wait=waits.append, say=said.append)
    assert 3 * lease.RENEW_SECONDS <= sum(waits) <= 15
    assert len(said) == 1
    dead.release()
    with pytest.raises(Conflict):
        dead.renew()
    taken.renew()


def test_of_two_that_wait_for_a_dead_writer_one_gets_the_lease(store: Store) -> None:
    take(store)
    looks = iter(range(2 * LOOKS))
    winner: list[Lease] = []

    def wait(_: float) -> None:
        if next(looks) == LOOKS - 2:
            winner.append(take(store, lambda _: None))

    with pytest.raises(HeliostatError, match="is being written by"):
        take(store, wait)
    winner[0].renew()


def test_a_held_lease_is_renewed_and_given_back_even_after_an_error(tmp_path: Path) -> None:
    renewed = threading.Event()

    class Watched(LocalStore):
        def replace(self, key: str, data: bytes, etag: str) -> str:
            renewed.set()
            return super().replace(key, data, etag)

    def fail(store: Store) -> None:
        with lease.hold(store, RUN, period_seconds=0.001, say=quiet):
            assert renewed.wait(10)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail(Watched(str(tmp_path)))
    take(LocalStore(str(tmp_path))).release()


def test_only_the_last_of_many_writers_passes_the_fence(store: Store) -> None:
    fences = [lease.raise_fence(store, RUN) for _ in range(3)]
    assert [fence.number for fence in fences] == [1, 2, 3]
    fences[-1].check()
    for fence in fences[:-1]:
        with pytest.raises(HeliostatError, match="commits nothing"):
            fence.check()


@pytest.mark.parametrize("damaged", [b"", b"3", b'{"host": "a"'])
def test_whoever_holds_a_damaged_lease_is_waited_for_like_the_dead(
    store: Store, damaged: bytes
) -> None:
    take(store)
    store.write(f"runs/{RUN}/lease.json", damaged)
    waits: list[float] = []
    said: list[str] = []
    lease.acquire(store, RUN, wait=waits.append, say=said.append).renew()
    assert sum(waits) >= 3 * lease.RENEW_SECONDS
    assert "whose lease is damaged" in said[0]


@pytest.mark.parametrize("left", [b"", b"x", b"-3", b"1000000", None])
def test_a_lost_fence_is_raised_above_all_that_left_checkpoints(
    store: Store, left: bytes | None
) -> None:
    older = [lease.raise_fence(store, RUN) for _ in range(3)]
    store.write(f"{checkpoint.make_key(RUN, 10, older[-1].number)}/COMMITTED", b"")
    store.delete(f"runs/{RUN}/fence")
    if left is not None:
        store.write(f"runs/{RUN}/fence", left)
    older[-1].check()
    newer = lease.raise_fence(store, RUN)
    assert newer.number == 4
    with pytest.raises(HeliostatError, match="commits nothing"):
        older[-1].check()
