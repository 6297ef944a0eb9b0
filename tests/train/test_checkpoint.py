"""The commit protocol: what is not committed or does not verify is never resumed from."""

import json
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from garbling import ForgetfulStore, GarblingStore
from heliostat.errors import HeliostatError
from heliostat.storage import LocalStore, Store, connect
from heliostat.train import checkpoint, lease
from heliostat.train.checkpoint import Best, Found, Retention
from heliostat.train.reader import read_newest, read_weights
from heliostat.train.state import State, name_tensors
from heliostat.train.writer import Writer
from sharding import RUN, empty, flip, make_state, remove, same, save, train, truncate, whole

FILE = "rank-00000-000.safetensors"
OBJECTS = [FILE, "manifest.json", "COMMITTED"]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05, momentum=0.5),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, fused=True),
}


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path)


@pytest.fixture
def store(root: str) -> Store:
    return connect(root)


@pytest.fixture
def state() -> State:
    state = make_state(0)
    train(state, range(2))
    return state


def newest_step(store: Store, warn: Callable[[str], None] = lambda _: None) -> int | None:
    found = read_newest(store, RUN, make_state(1), warn)
    return found.step if found else None


def left_of(store: Store) -> set[str]:
    return {entry.key.rpartition("/")[0] for entry in store.list("runs/")}


def test_the_newest_committed_checkpoint_is_found_whole(root: str, state: State) -> None:
    store, fresh = connect(root), make_state(1)
    assert read_newest(store, RUN, fresh) is None
    save(root, state, 100, 900, 1000)
    found = read_newest(store, RUN, fresh)
    assert found is not None
    assert (found.step, found.extra) == (1000, {"epoch": 1000})
    assert same(whole(fresh), whole(state))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_resumed_run_equals_an_undisturbed_one(root: str, kind: str) -> None:
    undisturbed = make_state(0, optimizer=OPTIMIZERS[kind])
    train(undisturbed, range(2))
    save(root, undisturbed, 2)
    train(undisturbed, range(2, 5))
    resumed = make_state(1, optimizer=OPTIMIZERS[kind])
    train(resumed, range(1))
    read_newest(connect(root), RUN, resumed)
    train(resumed, range(2, 5))
    assert same(whole(resumed), whole(undisturbed))


def test_what_the_network_garbles_is_read_again(store: Store, state: State) -> None:
    save(store.uri, state, 2)
    fresh = make_state(1)
    garbling = GarblingStore(store.uri)
    found = read_newest(garbling, RUN, fresh, warn=pytest.fail)
    assert garbling.seen
    assert found is not None
    assert same(whole(fresh), whole(state))


class Killed(Exception):
    pass


@dataclass(frozen=True)
class Dying(LocalStore):
    """Dies before the write number `last` and refuses all that a dead process would not do."""

    last: int
    writes: Iterator[int]

    def write(self, key: str, data: bytes) -> str:
        self._live()
        return super().write(key, data)

    def create(self, key: str, data: bytes) -> str:
        self._live()
        return super().create(key, data)

    def delete(self, key: str) -> None:
        self._live()
        super().delete(key)

    def _live(self) -> None:
        if next(self.writes) >= self.last:
            raise Killed


def test_whenever_a_writer_is_killed_a_whole_checkpoint_is_found(
    root: str, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every write and deletion of a save with retention, until one is reached that lives."""
    monkeypatch.setattr("heliostat.train.writer.FILE_BYTES", 100)
    before = make_state(3)
    for last in count():
        run = f"run-{last}"
        for step in (1, 2):
            writer = Writer(connect(root), run, Retention(keep=2))
            writer.begin(step, before, {})
            writer.finish()
        dying = Writer(Dying(root, last, count()), run, Retention(keep=1))
        dying.begin(3, state, {})
        try:
            dying.finish()
        except Killed:
            pass
        else:
            break
        fresh = make_state(1)
        found = read_newest(connect(root), run, fresh, warn=pytest.fail)
        assert found is not None
        assert same(whole(fresh), whole(before if found.step == 2 else state))
    assert last > 15
    assert [found.step for found in checkpoint.find(connect(root), run)] == [3]


@pytest.mark.parametrize("damage", [truncate, flip, empty, remove])
@pytest.mark.parametrize("name", OBJECTS)
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(
    root: str, state: State, damage: Callable[[Path], None], name: str
) -> None:
    save(root, state, 1, 2)
    newest = checkpoint.committed(connect(root), RUN)[0]
    damage(Path(root, newest, name))
    warnings: list[str] = []
    assert newest_step(connect(root), warnings.append) == 1
    gone = name == "COMMITTED" and damage is remove
    assert len(warnings) == (0 if gone else 1)
    assert all(newest in warning for warning in warnings)
    weights = read_weights(connect(root), checkpoint.committed(connect(root), RUN)[0])
    assert weights is not None
    assert (weights.step == 2) <= (name == FILE)


@settings(deadline=None, max_examples=30)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_no_flipped_bit_of_a_file_goes_unnoticed(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    root = str(tmp_path_factory.mktemp("store"))
    save(root, make_state(0), 1)
    path = next(Path(root).rglob(FILE))
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)
    assert newest_step(connect(root)) is None


def test_who_finds_all_checkpoints_damaged_keeps_them_for_a_better_machine(
    root: str, state: State
) -> None:
    save(root, state, 1, 2)
    with pytest.raises(HeliostatError, match="none of the 2 checkpoints of run"):
        newest_step(ForgetfulStore(root))
    assert newest_step(connect(root)) == 2


def test_a_state_is_not_touched_by_a_checkpoint_that_does_not_verify(
    root: str, state: State
) -> None:
    save(root, state, 1)
    flip(next(Path(root).rglob(FILE)))
    fresh = make_state(1)
    before = whole(fresh)
    assert read_newest(connect(root), RUN, fresh) is None
    assert same(whole(fresh), before)


def test_every_file_is_safetensors_or_json_and_nothing_is_pickled(root: str, state: State) -> None:
    save(root, state, 1)
    key = checkpoint.committed(connect(root), RUN)[0]
    assert sorted(path.name for path in Path(root, key).glob("[!.]*")) == sorted(OBJECTS)
    json.loads(Path(root, key, "manifest.json").read_bytes())
    read = safetensors.torch.load(Path(root, key, FILE).read_bytes())
    assert same(read, dict(name_tensors(state)))


def test_what_is_written_is_the_state_of_when_it_began(root: str, state: State) -> None:
    """The run goes on while a slow store takes its time."""
    trained, taken = threading.Event(), whole(state)

    class Slow(LocalStore):
        def write(self, key: str, data: bytes) -> str:
            assert trained.wait(20)
            return super().write(key, data)

    writer = Writer(Slow(root), RUN, Retention(keep=2))
    writer.begin(2, state, {})
    train(state, range(2, 4))
    trained.set()
    assert writer.finish() > 0
    assert writer.saved is not None
    assert writer.saved.step == 2
    fresh = make_state(1)
    read_newest(connect(root), RUN, fresh)
    assert same(whole(fresh), taken)
    assert not same(whole(fresh), whole(state))


def test_two_writers_of_one_step_never_mix(root: str, state: State) -> None:
    save(root, state, 5)
    save(root, state, 5)
    first, second = checkpoint.committed(connect(root), RUN)
    assert first != second


def test_a_writer_that_another_has_followed_commits_nothing(root: str, state: State) -> None:
    store = connect(root)
    old, new = lease.raise_fence(store, RUN), lease.raise_fence(store, RUN)
    for fence in (new, old):
        writer = Writer(store, RUN, Retention(keep=9), fence=fence)
        writer.begin(fence.number, state, {})
        if fence is old:
            with pytest.raises(HeliostatError, match="later writer"):
                writer.finish()
        writer.finish()
    assert [found.step for found in checkpoint.find(store, RUN)] == [new.number]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_never_written(
    root: str, state: State, value: float
) -> None:
    save(root, state, 1)
    with torch.no_grad():
        list(state.model.parameters())[-1][1] = value
    writer = Writer(connect(root), RUN, Retention(keep=2))
    writer.begin(2, state, {})
    with pytest.raises(HeliostatError, match=r"model/2.bias has values .* not finite after step 2"):
        writer.begin(3, state, {})
    assert [found.step for found in checkpoint.find(connect(root), RUN)] == [1]


@contextmanager
def full_disk(limit_bytes: int) -> Iterator[None]:
    """Within, the system takes no more than so many bytes for a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_named_and_a_later_save_succeeds(root: str, store: Store) -> None:
    model = nn.Linear(1000, 1000)
    large = State(model, torch.optim.SGD(model.parameters(), lr=0.1))
    writer = Writer(store, RUN, Retention(keep=2))
    writer.begin(1, large, {})
    writer.finish()
    before = checkpoint.committed(store, RUN)
    with full_disk(limit_bytes=10**6):
        writer.begin(2, large, {})
        with pytest.raises(HeliostatError, match=f"cannot use {root}.* with free space"):
            writer.finish()
    assert left_of(store) == set(before)
    writer.begin(2, large, {})
    writer.finish()
    assert len(checkpoint.committed(store, RUN)) == 2


def test_a_model_of_another_shape_is_refused_by_the_name_that_differs(
    root: str, state: State
) -> None:
    save(root, state, 1)
    model = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 2))
    other = State(model, torch.optim.SGD(model.parameters(), lr=0.1), state.average)
    with pytest.raises(HeliostatError, match=r"model/0.bias is of shape \[6\] in this run and of"):
        read_newest(connect(root), RUN, other)


def test_the_weights_to_publish_are_the_averages_beside_the_buffers(
    root: str, state: State
) -> None:
    save(root, state, 1)
    weights = read_weights(connect(root), checkpoint.committed(connect(root), RUN)[0])
    assert weights is not None
    assert same(weights.tensors, {**state.model.state_dict(), **state.average})
    state.model.load_state_dict(safetensors.torch.load(safetensors.torch.save(weights.tensors)))


def test_a_checkpoint_of_another_format_is_refused_and_not_passed_over(
    root: str, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as later:
        later.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
        save(root, state, 1)
    with pytest.raises(HeliostatError, match="format 2, this version reads 1"):
        newest_step(connect(root))


ATTEMPTS = st.lists(
    st.builds(
        Found,
        key=st.uuids().map(str),
        step=st.integers(0, 9),
        committed=st.booleans(),
        metric=st.none() | st.floats(width=16),
    ),
    max_size=12,
)


@settings(deadline=None)
@given(attempts=ATTEMPTS, keep=st.integers(1, 4), best=st.sampled_from([None, "lower", "higher"]))
def test_retention_keeps_the_newest_and_the_best_and_what_is_being_written(
    attempts: list[Found], keep: int, best: Best | None
) -> None:
    deleted = checkpoint.decide(attempts, Retention(keep, best))
    kept = [found for found in attempts if found not in deleted]
    committed = [found for found in attempts if found.committed]
    steps = sorted({found.step for found in committed}, reverse=True)
    assert len(deleted) + len(kept) == len(attempts)
    assert {found.step for found in kept if found.committed} >= set(steps[:keep])
    assert len({found.step for found in kept if found.committed}) <= keep + (best is not None)
    if not committed:
        assert not deleted
    else:
        unfinished = [found for found in attempts if not found.committed]
        assert [found for found in unfinished if found in kept] == [
            found for found in unfinished if found.step > steps[0]
        ]
    finite = [f for f in committed if f.metric is not None and abs(f.metric) < float("inf")]
    if best and finite:
        value = (min if best == "lower" else max)(f.metric for f in finite if f.metric is not None)
        assert value in [found.metric for found in kept if found.committed]
    assert checkpoint.decide(kept, Retention(keep, best)) == []


def test_retention_deletes_older_steps_and_leftovers_but_not_the_best(
    root: str, state: State
) -> None:
    store = connect(root)
    writer = Writer(store, RUN, Retention(keep=2, best="lower"))
    metrics = {1: 0.1, 2: 0.5, 3: 0.3, 4: 0.4}
    for step, metric in metrics.items():
        if step == 4:
            writer.finish()
            Path(root, checkpoint.committed(store, RUN)[0], "COMMITTED").unlink()
        writer.begin(step, state, {}, metric)
    writer.finish()
    assert [found.step for found in checkpoint.find(store, RUN)] == [4, 2, 1]
    assert left_of(store) == set(checkpoint.committed(store, RUN))


def test_a_score_that_cannot_be_read_is_asked_for_again(root: str, state: State) -> None:
    store = connect(root)
    writer = Writer(store, RUN, Retention(keep=1, best="lower", scored_later=True))
    writer.begin(1, state, {})
    writer.finish()
    (key,) = checkpoint.committed(store, RUN)
    checkpoint.record_score(store, key, 0.5)
    assert checkpoint.find_best(store, RUN, "lower") == key
    store.write(f"{key}/score.json", b'{"metr')
    assert checkpoint.find_best(store, RUN, "lower") is None
    assert [one.awaits_score for one in checkpoint.find(store, RUN)] == [True]


def test_a_checkpoint_that_is_being_scored_stays(root: str, state: State) -> None:
    store = connect(root)
    writer = Writer(store, RUN, Retention(keep=1, best="lower", scored_later=True))
    for step in range(1, 5):
        writer.begin(step, state, {})
    writer.finish()
    keys = {found.step: found.key for found in checkpoint.find(store, RUN)}
    assert sorted(keys) == [1, 2, 3, 4]
    checkpoint.record_score(store, keys[2], 0.5)
    checkpoint.record_score(store, keys[3], 0.7)
    writer.begin(5, state, {})
    writer.finish()
    assert [found.step for found in checkpoint.find(store, RUN)] == [5, 4, 2]
    assert checkpoint.find_best(store, RUN, "lower") == keys[2]


@given(steps=st.lists(st.integers(0, 99), unique=True), keep=st.integers(1, 4))
def test_without_any_score_the_checkpoints_that_wait_for_one_stay_few(
    steps: list[int], keep: int
) -> None:
    attempts = [Found(str(step), step, committed=True) for step in steps]
    deleted = checkpoint.decide(attempts, Retention(keep, "lower", scored_later=True))
    newest = sorted(steps, reverse=True)[: max(keep, checkpoint.MAX_UNSCORED)]
    assert {found.step for found in attempts if found not in deleted} == set(newest)


def test_a_dead_run_s_unfinished_attempts_are_collected(root: str, state: State) -> None:
    save(root, state, 1, 2)
    store = connect(root)
    newest, before = checkpoint.committed(store, RUN)
    Path(root, newest, "COMMITTED").unlink()
    assert checkpoint.collect(store, RUN) == [newest]
    assert left_of(store) == {before}


def test_a_real_bucket_holds_checkpoints_leases_and_fences(bucket: str, state: State) -> None:
    store, fresh = connect(bucket), make_state(1)
    for _ in range(2):
        with lease.hold(store, RUN):
            fence = lease.raise_fence(store, RUN)
            writer = Writer(store, RUN, Retention(keep=1), fence=fence)
            writer.begin(fence.number, state, {})
            writer.finish()
    assert [found.step for found in checkpoint.find(store, RUN)] == [2]
    assert read_newest(store, RUN, fresh) is not None
    assert same(whole(fresh), whole(state))


def test_runs_do_not_see_each_other(root: str, state: State) -> None:
    save(root, state, 1)
    assert read_newest(connect(root), RUN + "0", make_state(1)) is None
    assert read_newest(connect(root), RUN[:-1], make_state(1)) is None


def test_extra_is_taken_when_it_begins(root: str, state: State) -> None:
    extra: dict[str, Any] = {"data": {"version": "abc", "seed": 1}, "best": None}
    writer = Writer(connect(root), RUN, Retention(keep=2))
    writer.begin(1, state, extra)
    extra["data"]["seed"] = 2
    writer.finish()
    found = read_newest(connect(root), RUN, make_state(1))
    assert found is not None
    assert found.extra == {"data": {"version": "abc", "seed": 1}, "best": None}
