"""What runs took corrects the plans that follow: its laws, and its way through a bucket."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from heliostat import storage
from heliostat.hardware import find_machine
from heliostat.plan.calibration import (
    UNCORRECTED,
    Record,
    Taken,
    correct,
    keep,
    load,
    name_hardware,
)

PLANNED = Taken(1e9, 0.1, 1e8, 1e6, 0.5)
sizes = some.floats(1e-6, 1e6)
factors = some.floats(0.1, 40)


def record(run: str, factor: float, planned: Taken = PLANNED, hardware: str = "L4") -> Record:
    measured = replace(
        planned,
        memory_bytes=factor * planned.memory_bytes,
        step_seconds=factor * planned.step_seconds,
    )
    return Record(run, hardware, 100, planned, measured)


def test_without_runs_nothing_is_corrected() -> None:
    assert correct([], PLANNED) == UNCORRECTED


@given(factors, sizes, some.integers(1, 9))
def test_runs_that_agree_are_believed(factor: float, size: float, runs: int) -> None:
    """Whatever their size: planned anew and corrected, a run is what was measured."""
    planned = replace(PLANNED, step_seconds=size, memory_bytes=1e9 * size)
    found = correct([record(f"r{place}", factor, planned) for place in range(runs)], PLANNED)
    assert found.step.value == pytest.approx(factor)
    assert found.memory.value == pytest.approx(factor)
    assert found.runs == min(runs, 5)


def test_the_runs_that_are_nearest_count() -> None:
    small = [record(f"small{place}", 9.0, replace(PLANNED, step_seconds=1e-4)) for place in "12345"]
    large = [record(f"large{place}", 2.0) for place in "12345"]
    assert correct([*small, *large], PLANNED).step.value == pytest.approx(2.0)
    assert correct([*small, *large], replace(PLANNED, step_seconds=2e-4)).step.value > 8.9


def test_one_disturbed_run_among_three_is_outvoted() -> None:
    records = [record("a", 1.1), record("b", 30.0), record("c", 1.2)]
    assert correct(records, PLANNED).step.value == pytest.approx(1.2)


def test_what_was_not_measured_says_nothing() -> None:
    nothing = replace(record("a", 1.0), measured=replace(PLANNED, step_seconds=0.0))
    found = correct([nothing], PLANNED)
    assert found.step.runs == 0
    assert found.memory.runs == 1


def test_what_passes_beside_the_steps_is_the_median() -> None:
    measured = replace(PLANNED, hours=(100 * 0.1 + 42) / 3600)
    found = correct([replace(record("a", 1.0), measured=measured)], PLANNED)
    assert found.start_seconds == pytest.approx(42)


def test_records_are_of_their_hardware_and_one_of_each_run(tmp_path: Path) -> None:
    store = storage.connect(str(tmp_path))
    processor = "AMD EPYC 7B13 x 2"
    for one in (record("a", 1.0), record("a", 3.0), record("b", 2.0, hardware=processor)):
        keep(store, one)
    assert load(store, "L4") == [record("a", 3.0)]
    assert load(store, processor) == [record("b", 2.0, hardware=processor)]
    assert load(store, "H100") == []


def test_a_record_that_cannot_be_read_does_not_count(tmp_path: Path) -> None:
    store = storage.connect(str(tmp_path))
    keep(store, record("a", 1.0))
    store.write("calibration/l4/b.json", b'{"run": "b"}')
    store.write("calibration/l4/c.json", b"\xff")
    whole = store.read("calibration/l4/a.json")
    for index, data in enumerate([b"null", b"3", b"[]", whole[:-9], whole.replace(b"100", b'"x"')]):
        store.write(f"calibration/l4/{index}.json", data)
    assert load(store, "L4") == [record("a", 1.0)]


def test_hardware_is_the_accelerator_or_the_machine() -> None:
    assert name_hardware(find_machine("g6.xlarge")) == name_hardware(find_machine("g6.48xlarge"))
    assert name_hardware(find_machine("m7i.4xlarge")) == "m7i.4xlarge"
