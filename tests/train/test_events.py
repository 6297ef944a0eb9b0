"""TensorBoard files, read back by TensorBoard: nothing is lost, overwritten or told twice."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.directory_watcher import DirectoryWatcher
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from heliostat.metrics import emit
from heliostat.storage import LocalStore, connect
from heliostat.train.events import EventFiles

FOLDER = "runs/run/tensorboard"
VALUES = st.floats(width=32, allow_nan=False, allow_infinity=False)


def write(files: EventFiles, steps: range, scale: float = 1.0) -> None:
    for step in steps:
        emit(step, {"loss": scale / step, "validation/loss": scale}, [files])
    files.upload()


def read(store: LocalStore, tag: str = "loss") -> list[tuple[int, float]]:
    """What TensorBoard shows of a run whose folder it has been given."""
    shown = EventAccumulator(f"{store.uri}/{FOLDER}")
    shown.Reload()
    return [(event.step, event.value) for event in shown.Scalars(tag)]


def curve(steps: range, scale: float = 1.0) -> list[tuple[int, Any]]:
    return [(step, pytest.approx(scale / step)) for step in steps]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = connect(str(tmp_path))
    assert isinstance(store, LocalStore)
    return store


def test_what_was_emitted_is_shown(store: LocalStore) -> None:
    write(EventFiles(store, "run"), range(1, 6))
    assert read(store) == curve(range(1, 6))
    assert read(store, "validation/loss") == [(step, 1.0) for step in range(1, 6)]


@pytest.mark.parametrize("max_bytes", [1, 300, 2**20])
def test_files_of_any_size_hold_the_same_curve(store: LocalStore, max_bytes: int) -> None:
    files = EventFiles(store, "run", max_bytes=max_bytes)
    for first in range(1, 30, 3):
        write(files, range(first, first + 3))
        files.upload()
    assert read(store) == curve(range(1, 31))
    whole = {1: 10, 300: 5, 2**20: 1}
    assert len(list(store.list(FOLDER))) == whole[max_bytes]


def test_an_uploaded_file_only_ever_grows_at_its_end(store: LocalStore) -> None:
    files = EventFiles(store, "run", max_bytes=500)
    before: dict[str, bytes] = {}
    for step in range(1, 20):
        write(files, range(step, step + 1))
        now = {entry.key: store.read(entry.key) for entry in store.list(FOLDER)}
        assert all(now[key].startswith(data) for key, data in before.items())
        before = now


def test_a_resumed_run_shows_one_curve_and_keeps_every_file(store: LocalStore) -> None:
    """The first attempt got to step 9 after its checkpoint of step 6; the second repeats 7 to 9."""
    write(EventFiles(store, "run", unix_time=lambda: 1e9), range(1, 10), scale=-1.0)
    first = {entry.key: store.read(entry.key) for entry in store.list(FOLDER)}
    write(EventFiles(store, "run", first_step=6, unix_time=lambda: 1e9 + 60), range(7, 13))
    assert read(store) == [*curve(range(1, 7), -1.0), *curve(range(7, 13))]
    assert {key: store.read(key) for key in first} == first


def test_attempts_of_one_second_do_not_share_a_file(store: LocalStore) -> None:
    for _ in range(3):
        write(EventFiles(store, "run", unix_time=lambda: 1e9), range(1, 2))
    assert len(list(store.list(FOLDER))) == 3


def test_nothing_new_is_not_uploaded_again(store: LocalStore) -> None:
    files = EventFiles(store, "run")
    write(files, range(1, 3))
    (before,) = store.list(FOLDER)
    files.upload()
    assert list(store.list(FOLDER)) == [before]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1), VALUES), min_size=1, max_size=5))
def test_any_name_and_number_survives_tensorboards_own_reader(
    tmp_path_factory: pytest.TempPathFactory, told: list[tuple[str, float]]
) -> None:
    folder = tmp_path_factory.mktemp("events")
    files = EventFiles(connect(str(folder)), "run")
    for step, (name, value) in enumerate(told, start=1):
        emit(step, {f"score/{name}": value}, [files])
    files.upload()
    watcher = DirectoryWatcher(str(folder / FOLDER), EventFileLoader, lambda path: True)
    events = [event for event in watcher.Load() if event.summary.value]
    tags = [(event.step, event.summary.value[0].tag) for event in events]
    assert tags == [(step, f"score/{name}") for step, (name, _) in enumerate(told, start=1)]
