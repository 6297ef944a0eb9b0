"""What runs took of what was planned for them, and how that corrects the plans that follow."""

import json
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import log

from heliostat.hardware import Machine
from heliostat.storage import Store
from heliostat.storage.documents import Damaged, read_document

# Of all runs on the same hardware, those whose figure was planned to be closest count.
NEAREST = 5


@dataclass(frozen=True)
class Taken:
    """What a run takes, planned or measured.

    `memory_bytes` is a worker's peak, `step_seconds` a step without waiting for rows,
    `checkpoint_bytes` one checkpoint, `read_bytes` what is read from the bucket for a step and
    `hours` all from its start to its end.
    """

    memory_bytes: float
    step_seconds: float
    checkpoint_bytes: float
    read_bytes: float
    hours: float


@dataclass(frozen=True)
class Record:
    """One run on `hardware`: what was planned, before any correction, and what it took."""

    run: str
    hardware: str
    steps: int
    planned: Taken
    measured: Taken


@dataclass(frozen=True)
class Factor:
    """By what a planned figure is multiplied, as `runs` on that hardware show."""

    value: float = 1.0
    runs: int = 0

    def say_runs(self) -> str:
        runs = "1 run" if self.runs == 1 else f"{self.runs} runs"
        return f"by {runs} on this hardware"


@dataclass(frozen=True)
class Correction:
    """Factors of the planned memory and time of a step; seconds of a run beside its steps."""

    memory: Factor = field(default_factory=Factor)
    step: Factor = field(default_factory=Factor)
    start_seconds: float | None = None

    @property
    def runs(self) -> int:
        return self.step.runs


UNCORRECTED = Correction()


def correct(records: Sequence[Record], planned: Taken) -> Correction:
    """The correction for what is planned as `planned`, from records of the same hardware.

    The median of the ratios of the nearest runs: one that was disturbed does not count.
    """
    if not records:
        return UNCORRECTED
    near = _find_nearest(records, lambda taken: taken.step_seconds, planned)
    return Correction(
        _find_factor(records, lambda taken: taken.memory_bytes, planned),
        _find_factor(records, lambda taken: taken.step_seconds, planned),
        statistics.median(map(_count_beside, near)) if near else None,
    )


def name_hardware(machine: Machine) -> str:
    """What runs must have in common to be compared: the accelerator, or the machine."""
    return machine.accelerator or machine.name


def keep(store: Store, record: Record) -> None:
    """Store the record of a run, in place of an earlier one of the same run."""
    key = f"{_prefix(record.hardware)}{record.run}.json"
    store.write(key, json.dumps(asdict(record), indent=1).encode())


def load(store: Store, hardware: str) -> list[Record]:
    """The records of runs on `hardware`; one that cannot be read does not count."""
    records = []
    for entry in store.list(_prefix(hardware)):
        with suppress(Damaged):
            records.append(read_document(store, entry.key, Record))
    return records


def _find_factor(records: Sequence[Record], of: Callable[[Taken], float], planned: Taken) -> Factor:
    near = _find_nearest(records, of, planned)
    ratios = [of(record.measured) / of(record.planned) for record in near]
    return Factor(statistics.median(ratios), len(ratios)) if ratios else Factor()


def _find_nearest(
    records: Sequence[Record], of: Callable[[Taken], float], planned: Taken
) -> list[Record]:
    """By the ratio of the planned figures; those that were planned or measured as 0 say nothing."""
    known = [one for one in records if of(one.planned) > 0 and of(one.measured) > 0]
    if of(planned) <= 0:
        return []
    return sorted(known, key=lambda one: abs(log(of(one.planned) / of(planned))))[:NEAREST]


def _count_beside(record: Record) -> float:
    steps_seconds = record.steps * record.measured.step_seconds
    return max(0.0, 3600 * record.measured.hours - steps_seconds)


def _prefix(hardware: str) -> str:
    """A folder for each hardware, by its letters and digits."""
    name = "".join(letter if letter.isalnum() else "-" for letter in hardware.lower())
    return f"calibration/{name}/"
