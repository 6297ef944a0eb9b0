"""What a run will take, told before it starts, and a sentence if it cannot fit.

As a program it reads a question from its standard input and answers in JSON: PyTorch, with which a
model is measured, takes seconds to load, and the driver of a run does without it.
"""

import json
import pickle
import sys
from dataclasses import asdict, dataclass

from heliostat.data.expected import Rows
from heliostat.errors import HeliostatError
from heliostat.hardware import Machine
from heliostat.plan import Assumptions, Plan, correct_plan, find_remedy, make_plan
from heliostat.plan.calibration import Record, Taken
from heliostat.quantity import as_quantity, as_seconds
from heliostat.spec import RunSpec

# A run is refused if it takes more than there is, not if it leaves little.
ASSUMED = Assumptions(spare={True: 0.0, False: 0.0})


@dataclass(frozen=True)
class Question:
    spec: RunSpec
    rows: Rows
    machine: Machine
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Forecast:
    """A plan in a line; `refusal` says why it cannot be, `planned` is it before any correction.

    `planned` is None where nothing can be told, as of a network that looks at values.
    """

    line: str
    refusal: str | None = None
    planned: Taken | None = None


def forecast(question: Question) -> Forecast:
    from heliostat.train.foresee import foresee, foresee_volume

    spec, rows = question.spec, question.rows
    try:
        model = foresee(spec, rows)
        volume = foresee_volume(spec, rows, model, None)
        raw = make_plan(model, spec.train, volume, question.machine, ASSUMED)
    except HeliostatError as error:
        return Forecast(f"plan: none, {error}")
    plan = correct_plan(raw, question.records)
    refusal = None if plan.room.fits else _refuse(plan)
    return Forecast(_render(plan), refusal, raw.taken)


def read(answer: bytes) -> Forecast:
    document = json.loads(answer)
    planned = document.pop("planned")
    return Forecast(**document, planned=Taken(**planned) if planned else None)


def _render(plan: Plan) -> str:
    """`plan: 1.2 GiB of 22.5 GiB a worker, a step of 21 ms, 630 steps in 0.02 h, 0.01 kWh`."""
    room, bill = plan.room, plan.bill
    usd = f", ${bill.usd:,.2f}" if bill.usd else ""
    runs = plan.assumed.correction.step
    corrected = f" (corrected x {runs.value:.2f} {runs.say_runs()})" if runs.runs else ""
    return (
        f"plan: {as_quantity(room.bytes, 'B')} of {as_quantity(room.limit_bytes, 'B')} "
        f"for each worker, a step of {as_seconds(plan.step.seconds)}{corrected}, "
        f"{bill.steps:,} steps in {bill.hours:,.2f} h, {bill.kwh:,.3g} kWh{usd}"
    )


def _refuse(plan: Plan) -> str:
    remedy = find_remedy(plan)
    advice = (
        f"it would fit with {remedy}"
        if remedy
        else "no change of the train section makes it fit: use machines of more memory, which "
        "`heliostat plan` compares"
    )
    return (
        f"a worker of this run takes {as_quantity(plan.room.bytes, 'B')}, and "
        f"{plan.fleet.machine.name} has {as_quantity(plan.room.limit_bytes, 'B')} for each: "
        f"{advice}"
    )


def main() -> None:
    # From the process that started this one.
    question = pickle.load(sys.stdin.buffer)  # noqa: S301
    print(json.dumps(asdict(forecast(question))))


if __name__ == "__main__":
    main()
