"""Progress: means over what was trained, the same curves after a cut, lines a person can read."""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from heliostat.errors import HeliostatError
from heliostat.metrics import Sample
from heliostat.storage import LocalStore, connect
from heliostat.train import goodput, progress
from heliostat.train.goodput import CHECKPOINT, CLASSES, Ledger
from heliostat.train.loop import StepReport
from heliostat.train.progress import Display, Progress, Stretch, Workload, measure_pace, render

WORKLOAD = Workload(steps=100, steps_per_epoch=10)
NUMBERS = st.floats(-1e6, 1e6)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def report(step: int, weight: int = 8, loss: float | None = None) -> StepReport:
    metrics = {"loss": 1 / step if loss is None else loss, "accuracy": step / 100}
    return StepReport(step, weight, weight, metrics, 0.5, 0.1 / step, 1.0, 0.25)


class Run:
    """A run of steps that take a second each, its checkpoints one more; every line is kept."""

    def __init__(self, store: LocalStore, first_step: int = 0, workload: Workload = WORKLOAD):
        self.clock = Clock()
        self.lines: list[str] = []
        self.emitted: list[tuple[int, dict[str, float]]] = []
        self.ledger = Ledger("job", clock=self.clock)
        display = Display(float("inf"), lambda line, share: self.lines.append(line), lambda: None)
        self.progress = Progress(
            store,
            "run",
            workload,
            self.ledger,
            live=[self._keep],
            first_step=first_step,
            display=display,
        )

    def _keep(self, step: int, samples: Sequence[Sample]) -> None:
        self.emitted.append((step, {sample.key: sample.value for sample in samples}))

    def play(self, steps: range, checkpoint_steps: int = 7) -> None:
        for step in steps:
            self.clock.now += 1
            self.progress.add(report(step))
            if step % checkpoint_steps == 0:
                with self.ledger.spend(CHECKPOINT):
                    self.clock.now += 1
                    self.progress.record(wait=True)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = connect(str(tmp_path))
    assert isinstance(store, LocalStore)
    return store


def records(store: LocalStore) -> dict[str, dict[str, float]]:
    return {
        entry.key: json.loads(store.read(entry.key)) for entry in store.list("runs/run/progress/")
    }


def curve(store: LocalStore, tag: str) -> list[tuple[int, float]]:
    shown = EventAccumulator(f"{store.uri}/runs/run/tensorboard")
    shown.Reload()
    return [(event.step, event.value) for event in shown.Scalars(tag)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 100), NUMBERS), min_size=1, max_size=20))
def test_a_mean_weighs_every_step_by_its_weight(steps: list[tuple[int, float]]) -> None:
    stretch = Stretch(Ledger("job"))
    for step, (weight, loss) in enumerate(steps, start=1):
        stretch.add(report(step, weight, loss))
    total = sum(weight * loss for weight, loss in steps)
    weights = sum(weight for weight, _ in steps)
    means = stretch.means()
    assert means["loss"] == pytest.approx(total / weights, abs=1e-6)
    assert means["learning_rate"] == 0.1 / len(steps)
    assert means["grad_norm"] == 0.5
    assert stretch.rows == weights


@pytest.mark.parametrize(("norms", "mean"), [([0.5, math.inf, 1.5], 1.0), ([math.nan], None)])
def test_a_gradient_that_overflowed_and_was_left_out_is_not_counted(
    store: LocalStore, norms: list[float], mean: float | None
) -> None:
    """As in fp16, whenever its scale has become too large."""
    run = Run(store)
    for step, norm in enumerate(norms, start=1):
        run.progress.add(replace(report(step), grad_norm=norm))
    run.progress.record(wait=True)
    run.progress.finish()
    assert run.progress.metrics.get("grad_norm") == mean


def test_a_line_every_five_seconds_with_the_means_since_the_one_before(store: LocalStore) -> None:
    run = Run(store)
    run.play(range(1, 13), checkpoint_steps=100)
    assert [line.split("  ")[0] for line in run.lines] == ["step 5/100", "step 10/100"]
    assert run.lines[1] == (
        "step 10/100  epoch 1  loss 0.1291  accuracy 0.08  lr 0.01  grad 0.5  8 samples/s  wait 25%"
    )
    run.progress.finish()
    assert run.lines[2].startswith("step 12/100  epoch 2  loss 0.0871")
    assert run.lines[3].startswith("goodput 75.0%: productive 9 s, data 2.75 s, startup 0.25 s")


def test_every_sink_gets_every_metric_with_each_line(store: LocalStore) -> None:
    workload = Workload(100, 10, row_tokens=4, row_flops=1e3, peak_flops=64e3)
    run = Run(store, workload=workload)
    run.play(range(1, 8), checkpoint_steps=3)
    (step, values), *_ = run.emitted
    assert step == 4
    assert values["tokens_per_second"] == 4 * values["samples_per_second"] == 4 * 4 * 8 / 5
    assert values["checkpoint_stall_share"] == 1 / 5
    assert values["mfu"] == pytest.approx(4 * 8 * 1e3 / 5 / 64e3)
    assert sum(values[f"goodput/{kind}"] for kind in CLASSES) == pytest.approx(5)


def test_a_resumed_run_records_and_draws_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    whole, cut = (connect(str(tmp_path / name)) for name in ("whole", "cut"))
    assert isinstance(whole, LocalStore)
    assert isinstance(cut, LocalStore)
    workload = Workload(100, 10, curve_steps=3)
    for store, stretches in [(whole, [range(1, 31)]), (cut, [range(1, 12), range(8, 31)])]:
        for steps in stretches:
            run = Run(store, steps.start - 1, workload)
            run.play(steps)
            if steps.stop == 31:
                run.progress.finish()
    assert curve(cut, "loss") == curve(whole, "loss")
    assert curve(cut, "accuracy") == curve(whole, "accuracy")
    told = ("step", "loss", "accuracy", "learning_rate", "grad_norm")
    one, other = (
        [{key: record[key] for key in told} for record in records(store).values()]
        for store in (whole, cut)
    )
    assert one == other
    assert [record["step"] for record in one] == [7, 14, 21, 28]


def test_a_checkpoint_keeps_metrics_validation_curves_and_goodput(store: LocalStore) -> None:
    run = Run(store)
    run.play(range(1, 7))
    run.progress.add_validation({"loss": 0.5, "accuracy": 0.75})
    assert run.emitted[-1] == (6, {"validation/loss": 0.5, "validation/accuracy": 0.75})
    run.play(range(7, 8))
    (record,) = records(store).values()
    assert record["step"] == 7
    assert record["validation/accuracy"] == 0.75
    assert record["loss"] == pytest.approx(sum(1 / step for step in range(1, 8)) / 7)
    assert run.progress.metrics.items() <= record.items()
    assert curve(store, "validation/loss") == [(6, 0.5)]
    run.progress.finish()
    (attempt,) = goodput.load_attempts(store, "run")
    assert (attempt.step, attempt.checkpoints) == (7, 1)
    assert attempt.seconds == run.ledger.attempt.seconds


def test_the_last_line_is_not_told_twice(store: LocalStore) -> None:
    run = Run(store)
    run.play(range(1, 6), checkpoint_steps=5)
    run.progress.finish()
    assert [line.split("  ")[0] for line in run.lines[:-1]] == ["step 5/100"]
    (_, first), (_, last) = run.emitted
    assert last["samples_per_second"] == first["samples_per_second"] > 0
    assert last["goodput/checkpoint"] == 1


def test_a_validation_that_is_not_a_number_is_refused_by_name(store: LocalStore) -> None:
    with pytest.raises(HeliostatError, match="metric 'validation/loss' is nan"):
        Run(store).progress.add_validation({"loss": float("nan")})


def test_a_run_that_had_nothing_left_to_do_can_finish(store: LocalStore) -> None:
    run = Run(store, first_step=100)
    run.progress.record()
    run.progress.finish()
    assert run.lines == ["step 100/100  epoch 10", "goodput 0.0%: nothing yet"]


# --- How it is shown -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, ""),
        ({"loss": 0.00123456}, "  loss 0.001235"),
        ({"learning_rate": 3e-5, "grad_norm": 0.1249}, "  lr 3e-05  grad 0.125"),
        ({"samples_per_second": 6565.4, "tokens_per_second": 1e6}, "  6,565 samples/s"),
        ({"data_wait_share": 0.034, "mfu": 0.456}, "  wait 3%  MFU 45.6%"),
        ({"checkpoint_stall_share": 0.001}, ""),
        ({"checkpoint_stall_share": 0.1}, "  checkpoint 10%"),
        ({"validation/accuracy": 0.9}, "  validation accuracy 0.9"),
        ({"{0}": 1.0}, "  {0} 1"),
    ],
)
def test_a_line_tells_each_metric_in_its_unit(values: dict[str, float], told: str) -> None:
    line = render(Workload(1690, 23), 690, values)
    assert line.startswith(f"step 690/1,690  epoch 30{told}")


@pytest.mark.parametrize(
    ("workload", "missing"),
    [
        (Workload(1, 1), {"tokens_per_second", "mfu"}),
        (Workload(1, 1, row_tokens=2), {"mfu"}),
        (Workload(1, 1, row_flops=2.0), {"tokens_per_second", "mfu"}),
        (Workload(1, 1, row_tokens=2, row_flops=2.0, peak_flops=4.0), set()),
    ],
)
def test_what_nobody_knows_is_not_told(workload: Workload, missing: set[str]) -> None:
    spent = dict.fromkeys(CLASSES, 1.0)
    known = {"samples_per_second", "tokens_per_second", "data_wait_share", "mfu"}
    known.add("checkpoint_stall_share")
    assert measure_pace(workload, 8, 2.0, spent).keys() == known - missing


def test_a_terminal_shows_one_bar_that_is_drawn_over() -> None:
    stream = io.StringIO()
    display = progress.show_on_terminal(stream)
    display.show("step 1/4", 0.25)
    display.show("step 4/4", 1.0)
    display.finish()
    _, first, last = stream.getvalue().split("\r\x1b[2K")
    assert first == f"{'━' * 5}{'╌' * 15}  25%  step 1/4"
    assert last == f"{'━' * 20} 100%  step 4/4\n"


def test_a_bar_moves_between_the_lines(store: LocalStore) -> None:
    run = Run(store)
    shown: list[Any] = []
    display = Display(2.0, lambda line, share: shown.append(line.split()[1]), lambda: None)
    run.progress = Progress(store, "run", WORKLOAD, run.ledger, display=display)
    run.play(range(1, 11), checkpoint_steps=100)
    assert shown == ["2/100", "4/100", "5/100", "7/100", "9/100", "10/100"]


def test_a_log_gets_whole_lines() -> None:
    stream = io.StringIO()
    display = progress.show_in_log(stream)
    display.show("step 1/4", 0.25)
    display.show("step 4/4", 1.0)
    display.finish()
    assert stream.getvalue() == "step 1/4\nstep 4/4\n"
