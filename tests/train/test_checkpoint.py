"""The commit protocol: what is not committed or does not verify is never resumed from."""

from collections.abc import Callable
from pathlib import Path

import pytest

from heliostat.storage import Store, connect
from heliostat.train import checkpoint

FILES = {"model.safetensors": b"weights " * 100, "state.json": b"{}"}
RUN = "digits-1"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return connect(str(tmp_path))


def save_steps(store: Store, *steps: int) -> list[str]:
    return [checkpoint.save(store, RUN, step, FILES) for step in steps]


def newest_step(store: Store) -> int | None:
    found = checkpoint.load_newest(store, RUN)
    return found.step if found else None


def test_the_newest_committed_checkpoint_is_found_whole(store: Store) -> None:
    assert checkpoint.load_newest(store, RUN) is None
    save_steps(store, 100, 900, 1000)
    found = checkpoint.load_newest(store, RUN)
    assert found is not None
    assert (found.step, dict(found.files)) == (1000, FILES)


@pytest.mark.parametrize("written", range(len(FILES) + 1))
def test_a_save_that_dies_between_two_writes_is_invisible(tmp_path: Path, written: int) -> None:
    """Kill points: before each file and before the marker; the step before stays the newest."""
    store = connect(str(tmp_path))
    save_steps(store, 1)
    whole = tmp_path / save_steps(store, 2)[0]
    (whole / "COMMITTED").unlink()
    for name in ["manifest.json", *reversed(FILES)][: len(FILES) + 1 - written]:
        (whole / name).unlink()
    assert newest_step(store) == 1


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, empty, Path.unlink])
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    store = connect(str(tmp_path))
    _, newest = save_steps(store, 1, 2)
    damage(tmp_path / newest / name)
    warnings: list[str] = []
    found = checkpoint.load_newest(store, RUN, warn=warnings.append)
    assert found is not None
    assert found.step == 1
    assert len(warnings) == 1
    assert newest in warnings[0]
    assert name in warnings[0]


def test_two_writers_of_one_step_never_mix(store: Store) -> None:
    first, second = save_steps(store, 5, 5)
    assert first != second
    assert len(checkpoint.committed(store, RUN)) == 2


def test_retention_keeps_the_newest_and_removes_older_leftovers(tmp_path: Path) -> None:
    store = connect(str(tmp_path))
    keys = save_steps(store, 1, 2, 3, 4)
    (tmp_path / keys[1] / "COMMITTED").unlink()
    checkpoint.retain(store, RUN, keep=2)
    assert checkpoint.committed(store, RUN) == [keys[3], keys[2]]
    assert {entry.key.rpartition("/")[0] for entry in store.list("runs/")} == {keys[2], keys[3]}


def test_retention_never_touches_a_save_in_progress(tmp_path: Path) -> None:
    store = connect(str(tmp_path))
    keys = save_steps(store, 1, 2)
    (tmp_path / keys[1] / "COMMITTED").unlink()
    checkpoint.retain(store, RUN, keep=1)
    assert store.stat(f"{keys[1]}/manifest.json") is not None


def test_runs_do_not_see_each_other(store: Store) -> None:
    checkpoint.save(store, RUN + "0", 7, FILES)
    assert newest_step(store) is None
