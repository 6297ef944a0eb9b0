"""How far a run is: a bar on a terminal, lines in a log, curves, gauges, records in the bucket."""

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TextIO

from heliostat.metrics import (
    GRAD_NORM,
    LEARNING_RATE,
    MFU,
    SAMPLES,
    STALL_SHARE,
    TOKENS,
    VALIDATION,
    WAIT_SHARE,
    Sink,
    emit,
    plain,
)
from heliostat.storage import Store
from heliostat.train import goodput
from heliostat.train.events import EventFiles
from heliostat.train.goodput import CHECKPOINT, DATA, Ledger
from heliostat.train.loop import StepReport

LINE_SECONDS, BAR_SECONDS = 5.0, 0.2
BAR_WIDTH = 20


@dataclass(frozen=True)
class Workload:
    """What a run has to do, and what a row of it weighs.

    A point of a curve stands for `curve_steps` steps. `row_tokens` and `row_flops` (forward and
    backward) are 0 where there are none or nobody knows, as is `peak_flops`: what all devices of
    the run could make in a second.
    """

    steps: int
    steps_per_epoch: int
    curve_steps: int = 1
    row_tokens: int = 0
    row_flops: float = 0.0
    peak_flops: float = 0.0


@dataclass(frozen=True)
class Display:
    """How a line and the share of the work that is done are shown, beyond once a line's time."""

    every_seconds: float
    show: Callable[[str, float], None]
    finish: Callable[[], None]


def show_on_terminal(stream: TextIO) -> Display:
    """A bar that is drawn over itself."""

    def show(line: str, share: float) -> None:
        done = int(share * BAR_WIDTH)
        bar = f"{'━' * done}{'╌' * (BAR_WIDTH - done)}"
        print(f"\r\x1b[2K{bar} {share:4.0%}  {line}", end="", file=stream, flush=True)

    return Display(BAR_SECONDS, show, lambda: print(file=stream, flush=True))


def show_in_log(stream: TextIO) -> Display:
    """A line every few seconds."""

    def show(line: str, share: float) -> None:
        print(line, file=stream, flush=True)

    return Display(math.inf, show, lambda: None)


def choose_display() -> Display:
    return show_on_terminal(sys.stderr) if sys.stderr.isatty() else show_in_log(sys.stdout)


class Stretch:
    """The steps of a stretch of a run, as sums; it begins when it is made."""

    def __init__(self, ledger: Ledger):
        self.began = ledger.clock()
        self._spent = ledger.attempt.seconds
        self._sums: dict[str, float] = {}
        self._weight = self._steps = self._stepped = 0
        self._grad_norms = self._rate = 0.0
        self.rows = 0

    def __bool__(self) -> bool:
        return self._steps > 0

    def add(self, report: StepReport) -> None:
        for name, mean in report.metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + mean * report.weight
        self._weight += report.weight
        self._steps += 1
        if math.isfinite(report.grad_norm):  # else it overflowed in fp16, and the step was left out
            self._grad_norms += report.grad_norm
            self._stepped += 1
        self._rate = report.rate
        self.rows += report.rows

    def means(self) -> dict[str, float]:
        """The loss and what the task counts, by what a step weighs; the learning rate is the last.

        They are a function of the run's inputs and of its steps alone.
        """
        return {
            **{name: total / self._weight for name, total in self._sums.items()},
            LEARNING_RATE.name: self._rate,
            **({GRAD_NORM.name: self._grad_norms / self._stepped} if self._stepped else {}),
        }

    def pace(self, ledger: Ledger, workload: Workload) -> dict[str, float]:
        """What was done in a second, and which shares of the time it waited."""
        seconds = max(ledger.clock() - self.began, 1e-9)
        spent = ledger.attempt.seconds
        return measure_pace(
            workload, self.rows, seconds, {key: spent[key] - self._spent[key] for key in spent}
        )


def measure_pace(
    workload: Workload, rows: int, seconds: float, spent: Mapping[str, float]
) -> dict[str, float]:
    """`rows` in `seconds`, of which `spent` says what went where.

    MFU as Chowdhery et al. 2022 (PaLM), appendix B: the model's operations, none made twice.
    """
    pace = {
        SAMPLES.name: rows / seconds,
        TOKENS.name: rows * workload.row_tokens / seconds,
        WAIT_SHARE.name: min(1.0, spent[DATA] / seconds),
        STALL_SHARE.name: min(1.0, spent[CHECKPOINT] / seconds),
        MFU.name: rows * workload.row_flops / seconds / (workload.peak_flops or math.inf),
    }
    known = {TOKENS.name: workload.row_tokens, MFU.name: workload.row_flops * workload.peak_flops}
    return {name: value for name, value in pace.items() if known.get(name, 1)}


class Progress:
    """What a run reports, to be told of every step, checkpoint and validation by rank 0.

    `live` sinks get every metric each few seconds; the `curves` in the bucket get the loss and what
    the task counts every `curve_steps` steps, so that a resumed run draws what an undisturbed one
    draws.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        workload: Workload,
        ledger: Ledger,
        *,
        live: Sequence[Sink] = (),
        first_step: int = 0,
        display: Display | None = None,
    ):
        self._store, self._run, self._workload, self._ledger = store, run, workload, ledger
        self._live = live
        self._curves = EventFiles(store, run, first_step)
        self._display = display or choose_display()
        self._step = first_step
        self._line, self._curve, self._checkpoint = (Stretch(ledger) for _ in range(3))
        self._drawn = ledger.clock()
        self._means: dict[str, float] = {}
        self._pace: dict[str, float] = {}
        self._validation: dict[str, float] = {}
        self._thread = ThreadPoolExecutor(1, "goodput")
        self._writing: Future[None] | None = None
        self._recording: Future[None] | None = None
        self.metrics: dict[str, float] = {}

    def add(self, report: StepReport) -> None:
        """Count a step; shows where the run is if it is time to."""
        self._ledger.count(report)
        self._step = report.step
        for stretch in (self._line, self._curve, self._checkpoint):
            stretch.add(report)
        if report.step % self._workload.curve_steps == 0:
            self._draw_curve()
        now = self._ledger.clock()
        if now - self._line.began >= LINE_SECONDS:
            self.show()
        elif now - self._drawn >= self._display.every_seconds:
            self._draw_line()

    def add_validation(self, scores: Mapping[str, float]) -> None:
        """Count a pass over the validation split after the last step."""
        self._validation = plain({f"{VALIDATION.name}/{name}": scores[name] for name in scores})
        emit(self._step, self._validation, [*self._live, self._curves])

    def show(self) -> None:
        """Tell what happened since the last time, and begin anew."""
        if self._line or not self._means:
            self._draw_line()
        spent = self._ledger.total.values
        emit(self._step, {**self._means, **self._pace, **spent}, self._live)
        emit(self._step, {**self._pace, **spent}, [self._curves])
        self._line = Stretch(self._ledger)
        if self._writing is None or self._writing.done():
            self._writing = self._record_attempt()

    def record(self, wait: bool = False) -> None:
        """Keep the metrics since the last checkpoint beside the run: they outlive the cluster.

        They are written beside the loop; with `wait` they lie in the bucket when this returns.

        Raises:
            HeliostatError: what was recorded before cannot be written, or a metric is not finite.
        """
        self._draw_curve()
        if self._checkpoint:
            pace = self._checkpoint.pace(self._ledger, self._workload)
            self.metrics = plain({**self._checkpoint.means(), **pace})
        document = {"step": self._step, **self.metrics, **self._validation}
        document.update(self._ledger.total.values)
        key = f"runs/{self._run}/progress/{self._step:08d}.json"
        written = [(key, json.dumps(document).encode()), self._curves.take()]
        self._settle()
        self._recording = self._thread.submit(_write_all, self._store, written)
        self._writing = self._record_attempt()
        self._checkpoint = Stretch(self._ledger)
        if wait:
            self._settle()

    def finish(self) -> None:
        """The last line, and where the time went.

        Raises:
            HeliostatError: the bucket cannot be written.
        """
        self.show()
        self._display.show(self._ledger.total.render(), 1.0)
        self._display.finish()
        self._settle()
        self._curves.upload()
        self._record_attempt().result()
        self._thread.shutdown()

    def _settle(self) -> None:
        if self._recording is not None:
            self._recording.result()

    def _record_attempt(self) -> "Future[None]":
        """Beside the loop, which need not wait for it; one after the other."""
        return self._thread.submit(goodput.record, self._store, self._run, self._ledger.attempt)

    def _draw_curve(self) -> None:
        if self._curve:
            emit(self._step, self._curve.means(), [self._curves])
            self._curve = Stretch(self._ledger)

    def _draw_line(self) -> None:
        if self._line:
            self._means = self._line.means()
            self._pace = self._line.pace(self._ledger, self._workload)
        shown = {**self._means, **self._pace, **self._validation}
        line = render(self._workload, self._step, shown)
        self._display.show(line, min(1.0, self._step / self._workload.steps))
        self._drawn = self._ledger.clock()


def _write_all(store: Store, written: Iterable[tuple[str, bytes] | None]) -> None:
    for one in written:
        if one:
            store.write(*one)


# How a value is shown: the format, and what stands before it if not its name.
_SHOWN = {
    LEARNING_RATE.name: "lr {:.3g}",
    GRAD_NORM.name: "grad {:.3g}",
    SAMPLES.name: "{:,.0f} samples/s",
    TOKENS.name: "{:,.0f} tokens/s",
    WAIT_SHARE.name: "wait {:.0%}",
    STALL_SHARE.name: "checkpoint {:.0%}",
    MFU.name: "MFU {:.1%}",
}


def render(workload: Workload, step: int, values: Mapping[str, float]) -> str:
    """`step 690/690  epoch 30  loss 0.0012  accuracy 1  lr 0.003  grad 0.12  wait 3%`."""
    epoch = max(1, -(-step // workload.steps_per_epoch))
    parts = [f"step {step:,}/{workload.steps:,}", f"epoch {epoch:,}"]
    for name, value in values.items():
        if name == STALL_SHARE.name and value < 0.005:
            continue
        told = name.replace("/", " ").replace("{", "{{").replace("}", "}}")
        parts.append(_SHOWN.get(name, f"{told} {{:,.4g}}").format(value))
    return "  ".join(parts)
