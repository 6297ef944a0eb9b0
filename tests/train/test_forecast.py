"""What is told of a run before it starts: a line, a refusal with its remedy, or why none is."""

import json
import pickle
import subprocess
import sys
from dataclasses import asdict, replace

from heliostat import spec
from heliostat.data.expected import Rows
from heliostat.hardware import find_machine
from heliostat.plan.calibration import Record
from heliostat.signature import Blocks, NextToken, Signature
from heliostat.spec import RunSpec
from heliostat.train import forecast
from heliostat.train.forecast import Question, read

ROWS = Rows(Signature(Blocks(128, 1000, 0), NextToken()), 10_000, 256.0)
L4 = find_machine("g6.xlarge")


def make_run(width: int = 64, **train: object) -> RunSpec:
    section = {"gpus_per_worker": 1, "global_batch": 64, "steps": 100, **train}
    model = {"kind": "gpt", "layers": 2, "width": width, "heads": 4}
    data = {"source": "s3://nowhere", "text": {"vocab": 1000, "block": 128}}
    return spec.parse({"name": "told", "data": data, "model": model, "train": section})


def test_a_run_that_fits_is_told_in_a_line() -> None:
    found = forecast.forecast(Question(make_run(), ROWS, L4, ()))
    assert found.refusal is None
    for part in ("plan: ", " GiB for each worker, a step of ", "100 steps in ", " kWh, $"):
        assert part in found.line
    assert found.planned is not None


def test_one_that_cannot_fit_is_refused_with_what_would() -> None:
    found = forecast.forecast(Question(make_run(width=8192, global_batch=512), ROWS, L4, ()))
    assert found.refusal is not None
    assert "and g6.xlarge has 22.5 GiB for each: " in found.refusal
    assert "train.strategy=fsdp train.workers=" in found.refusal


def test_runs_on_the_same_hardware_correct_the_line_and_not_what_is_stored_as_planned() -> None:
    run = make_run()
    raw = forecast.forecast(Question(run, ROWS, L4, ()))
    assert raw.planned is not None
    measured = type(raw.planned)(**{**asdict(raw.planned), "step_seconds": 1.0})
    record = Record("earlier", "L4", 100, raw.planned, measured)
    found = forecast.forecast(Question(run, ROWS, L4, (record,)))
    assert found.planned == raw.planned
    assert "a step of 1.00 s (corrected x " in found.line
    assert "by 1 run on this hardware" in found.line


def test_a_machine_that_nobody_knows_is_no_reason_to_refuse() -> None:
    found = forecast.forecast(Question(make_run(), ROWS, replace(L4, accelerator="V100"), ()))
    assert found.refusal is None
    assert found.planned is None
    assert found.line.startswith("plan: none, V100 is not in the table")


def test_the_program_answers_what_the_function_does() -> None:
    question = Question(make_run(), ROWS, L4, ())
    command = [sys.executable, "-m", forecast.__name__]
    answer = subprocess.run(command, input=pickle.dumps(question), capture_output=True, check=True)
    assert read(answer.stdout) == forecast.forecast(question)
    assert json.loads(answer.stdout)["refusal"] is None
