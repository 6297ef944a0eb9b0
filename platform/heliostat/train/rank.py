"""What one worker of a run does: from the newest checkpoint to the last step, without Ray."""

import contextlib
import faulthandler
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import torch

from heliostat import storage
from heliostat.data import encoding, stream
from heliostat.data.features import BlockFeatures, TextFeatures
from heliostat.data.manifest import Manifest, load_manifest
from heliostat.data.tokens import refuse_other_tokenizer
from heliostat.errors import HeliostatError
from heliostat.metrics import Sink
from heliostat.models import build, count_parameters, task_of
from heliostat.models.cost import measure_cost
from heliostat.models.pretrained import load_pretrained
from heliostat.signature import Blocks
from heliostat.train import checkpoint, goodput, loop
from heliostat.train.cadence import Cadence
from heliostat.train.checkpoint import Best, Retention
from heliostat.train.ema import Average
from heliostat.train.goodput import CHECKPOINT, VALIDATION, Ledger
from heliostat.train.identity import to_extra
from heliostat.train.job import Ended, Job, Preempted, result_key
from heliostat.train.lease import raise_fence
from heliostat.train.micro_batch import fit_micro_batch
from heliostat.train.optim import build_optimizer, rate_at
from heliostat.train.parallel import Parallel, parallelize
from heliostat.train.peak import find_peak, measure_memory
from heliostat.train.progress import Progress, Workload
from heliostat.train.reader import Restored, read_newest
from heliostat.train.room import refuse_what_cannot_fit
from heliostat.train.state import State
from heliostat.train.stop import (
    HIGHER_IS_BETTER,
    Status,
    Trend,
    decide,
    find_metric,
    follow,
    watched,
)
from heliostat.train.writer import Writer

CURVE_POINTS = 50  # of TensorBoard, between two checkpoints
CURVE_STEPS = 2  # from one to the next, where it is not known when there will be checkpoints


@dataclass(frozen=True)
class Place:
    """Where a worker runs, one of `neighbours` on its machine.

    `fetch` gives it chunks of rows, `noticed` says whether a node will be taken away.
    """

    ranks: loop.Ranks
    device: torch.device
    neighbours: int
    fetch: Callable[[int], pa.Table]
    noticed: Callable[[], bool] = lambda: False
    live: Sequence[Sink] = ()
    waited: dict[str, float] = field(default_factory=dict)


@dataclass
class Position:
    """How far a run is beside its tensors; what a checkpoint keeps of it as JSON.

    `checkpoint` is the one that it went on from, `metrics` are those at its last one, `reason` is
    why it stopped there.
    """

    step: int = 0
    checkpoint: str | None = None
    tokens: int = 0
    seconds: float = 0.0
    trend: Trend = field(default_factory=Trend)
    scaler: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    reason: str | None = None

    def to_json(self, manifest: Manifest, seed: int, steps_per_epoch: int) -> dict[str, Any]:
        epoch, in_epoch = divmod(self.step, steps_per_epoch)
        return {
            "data": {
                "version": manifest.version,
                "seed": seed,
                "epoch": epoch,
                "step_in_epoch": in_epoch,
            },
            "tokens": self.tokens,
            "seconds": self.seconds,
            "trend": self.trend.to_json(),
            "scaler": self.scaler,
            "metrics": self.metrics,
            "reason": self.reason,
        }

    @classmethod
    def restore(cls, restored: Restored) -> "Position":
        told = restored.extra
        return cls(
            restored.step,
            restored.key,
            told["tokens"],
            told["seconds"],
            Trend(**told["trend"]),
            told["scaler"],
            told.get("metrics", {}),
            told.get("reason"),
        )


def train_rank(job: Job, place: Place) -> None:
    """Train until the last step or a reason to stop; rank 0 leaves `result.json` behind.

    Raises:
        Preempted: a node goes; all is committed up to the step that was reached.
        HeliostatError: what a retry cannot mend, such as a loss that is not finite.
    """
    with _watched(job.spec.train.hang_seconds) as alive:
        _Worker(job, place, alive).run()


class _Worker:
    """The parts of a worker, and the story of its run."""

    def __init__(self, job: Job, place: Place, alive: Callable[[], None]) -> None:
        self._job, self._place, self._alive = job, place, alive
        self._train, self._ranks = job.spec.train, place.ranks
        self._store = storage.connect(job.spec.root)
        self._manifest = load_manifest(self._store, job.data_name, job.data_version)
        self._order = stream.plan(
            self._manifest, "train", self._train.global_batch, self._train.seed
        )
        fence = raise_fence(self._store, job.run) if self._is_first else None
        earlier = goodput.load_attempts(self._store, job.run) if self._is_first else []
        self._described = to_extra(job.spec, self._manifest, job.weights)
        self._ledger = Ledger(job.submission, earlier, place.waited)
        self._cadence = Cadence(self._train.checkpoint_steps, earlier)
        self._parallel, self._state, self._average = self._build()
        self._micro_batch = self._choose_micro_batch()
        self._position = self._restore()
        self._resumed = time.monotonic() - self._position.seconds
        self._writer = Writer(self._store, job.run, self._retention, fence=fence)
        self._recipe = loop.Recipe(
            rate=self._rate,
            seed=self._train.seed,
            micro_batch=self._micro_batch,
            clip_norm=self._train.clip_norm,
            autocast=self._parallel.autocast,
            scaler=self._parallel.scaler,
            ask=self._vote,
        )
        self._progress = self._open_progress() if self._is_first else None

    def run(self) -> None:
        for report in self._fit():
            self._count(report)
            scores = self._validate() if self._is_due(self._train.validate_steps) else {}
            noticed, seconds, due = report.votes
            self._position.reason = decide(
                self._train,
                Status(report.step, self._position.tokens, seconds, scores, self._position.trend),
            )
            last = bool(self._position.reason) or report.step == self._job.steps
            ends = last or noticed > 0
            if ends or scores or due:
                self._save(scores, wait=ends)
            if last:
                break
            if noticed:
                raise Preempted(self._tell_saved(report.step))
        self._finish()

    def _tell_saved(self, step: int) -> str:
        told = f"saved at step {step:,}, as the workers were told to end"
        if self._is_first:
            print(told, flush=True)
        return told

    @property
    def _is_first(self) -> bool:
        return self._ranks.rank == 0

    @property
    def _best(self) -> Best:
        return "higher" if watched(self._train) in HIGHER_IS_BETTER else "lower"

    @property
    def _retention(self) -> Retention:
        keep, later = self._train.keep_checkpoints, self._train.validate_async
        best = self._best if self._train.validate_steps or later else None
        return Retention(keep, best, scored_later=later)

    @property
    def _rank_rows(self) -> int:
        """The most rows of a global batch that a rank has."""
        return -(-self._train.global_batch // self._ranks.world_size)

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self._position.step % every == 0

    def _rate(self, step: int) -> float:
        drops = self._position.trend.drops
        share = rate_at(self._train.schedule, step, self._job.steps, drops)
        return self._train.optimizer.lr * share

    def _build(self) -> tuple[Parallel, State, Average | None]:
        model, world_size = self._job.spec.model, self._ranks.world_size
        refuse_what_cannot_fit(
            model,
            self._manifest.signature,
            self._train,
            self._place.device,
            world_size=world_size,
            neighbours=self._place.neighbours,
        )
        torch.manual_seed(self._train.seed)
        network = build(model, self._manifest.signature)
        if model.init:
            features = self._manifest.features
            if isinstance(features, BlockFeatures | TextFeatures):
                refuse_other_tokenizer(self._store, features.tokenizer, model.init)
            load_pretrained(network, model, self._manifest.signature)
        task = task_of(model, self._manifest.signature)
        parallel = parallelize(network, task, self._train, self._place.device, world_size)
        optimizer = build_optimizer(self._train.optimizer, network)
        average = Average(network, self._train.ema) if self._train.ema else None
        state = State(network, optimizer, average.tensors if average else {})
        return parallel, state, average

    def _choose_micro_batch(self) -> int | None:
        if self._train.micro_batch != "auto":
            return self._train.micro_batch
        found = fit_micro_batch(
            self._parallel,
            self._state.optimizer,
            self._manifest.signature,
            self._train,
            self._place.device,
            world_size=self._ranks.world_size,
            neighbours=self._place.neighbours,
        )
        if self._is_first:
            print(found, flush=True)
        return found.rows

    def _restore(self) -> Position:
        """Go on from the newest checkpoint that verifies; a new run from its beginning."""
        if self._is_first:
            checkpoint.collect(self._store, self._job.run)
        say = print if self._is_first else _say_nothing
        restored = read_newest(self._store, self._job.run, self._state, say)
        if restored is None:
            return Position()
        position = Position.restore(restored)
        if position.scaler:
            self._parallel.scaler.load_state_dict(position.scaler)
        say(f"resumed from step {restored.step:,} ({restored.key})")
        return position

    def _open_progress(self) -> Progress:
        signature, every = self._manifest.signature, self._train.checkpoint_steps
        peak = find_peak(self._place.device, self._train.precision)
        print(f"MFU is of {peak.render()}", flush=True)
        workload = Workload(
            self._job.steps,
            self._order.steps_per_epoch,
            curve_steps=CURVE_STEPS if every == "auto" else -(-every // CURVE_POINTS),
            row_tokens=signature.input.length if isinstance(signature.input, Blocks) else 0,
            row_flops=self._count_row_flops(),
            peak_flops=peak.flops * self._ranks.world_size,
        )
        return Progress(
            self._store,
            self._job.run,
            workload,
            self._ledger,
            live=self._place.live,
            first_step=self._position.step,
        )

    def _count_row_flops(self) -> float:
        """0 where nobody can tell, as of a network of the user's own that looks at values."""
        try:
            cost = measure_cost(self._job.spec.model, self._manifest.signature)
        except HeliostatError:
            return 0.0
        return cost.train_flops_per_sample

    def _fit(self) -> Iterator[loop.StepReport]:
        if self._position.reason:  # it had ended, and was killed before it could say so
            return iter(())
        shares = stream.iter_shares(
            self._order,
            self._manifest,
            self._place.fetch,
            steps=range(self._position.step, self._job.steps),
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
        )
        return loop.fit(
            self._parallel.model,
            self._parallel.task,
            self._state.optimizer,
            stream.one_ahead(map(self._to_batch, shares)),
            self._recipe,
            first_step=self._position.step,
            ranks=self._ranks,
        )

    def _vote(self) -> tuple[float, float, float]:
        """Whether a node will go, by any rank; by the first, how long the run has trained, and
        whether to save after this step."""
        noticed = float(self._place.noticed())
        if not self._is_first:
            return noticed, 0.0, 0.0
        due = self._cadence.is_due(self._position.step + 1)
        return noticed, time.monotonic() - self._resumed, float(due)

    def _count(self, report: loop.StepReport) -> None:
        self._alive()
        self._position.step = report.step
        self._position.tokens += report.weight
        self._position.seconds = report.votes[1]
        if self._average:
            self._average.update()
        if self._progress:
            self._progress.add(report)

    def _validate(self) -> dict[str, float]:
        """Score the validation split on all ranks and follow the trend of the watched metric."""
        parts = stream.iter_part(
            self._store,
            self._manifest,
            "validation",
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            batch=self._micro_batch or self._rank_rows,
        )
        averaged = self._average.in_place() if self._average else contextlib.nullcontext()
        parallel = self._parallel
        with self._ledger.spend(VALIDATION), averaged:
            batches = map(self._to_batch, parts)
            scores = loop.validate(
                parallel.model, parallel.task, batches, self._recipe, self._ranks
            )
        self._alive()
        position = self._position
        position.trend = follow(self._train, position.trend, position.step, scores)
        if self._progress:
            self._progress.add_validation(scores)
        return scores

    def _save(self, scores: Mapping[str, float], wait: bool) -> None:
        """Begin a checkpoint; with `wait` it is committed when this returns."""
        self._alive()
        self._position.scaler = self._parallel.scaler.state_dict()
        metric = find_metric(self._train, scores) if scores else None
        began = time.monotonic()
        with self._ledger.spend(CHECKPOINT):
            if self._progress:
                self._progress.record(wait)
                self._position.metrics = self._progress.metrics
            position = self._position.to_json(
                self._manifest, self._train.seed, self._order.steps_per_epoch
            )
            self._writer.begin(self._position.step, self._state, position | self._described, metric)
            if wait:
                self._writer.finish()
        before = self._writer.saved
        self._cadence.count(time.monotonic() - began, before.seconds if before else 0.0)
        self._alive()

    def _finish(self) -> None:
        self._writer.finish()
        if self._progress is None:
            return
        self._progress.finish()
        position, saved = self._position, self._writer.saved
        if position.reason:
            print(f"stopped at step {position.step:,}: {position.reason}", flush=True)
        best = checkpoint.find_best(self._store, self._job.run, self._best)
        ended = Ended(
            position.step,
            position.reason,
            best or (saved.key if saved else position.checkpoint),
            position.metrics,
            count_parameters(self._state.model),
            measure_memory(self._place.device),
            self._ledger.step_seconds,
            self._ledger.total.wall_seconds / 3600,
        )
        self._store.write(result_key(self._job.run), json.dumps(asdict(ended)).encode())

    def _to_batch(self, share: stream.Share) -> loop.Batch:
        columns, device = dict(share.columns), self._place.device
        arrays = encoding.encode(self._manifest.features, columns)
        targets = encoding.encode_targets(self._manifest.output, columns)
        return loop.Batch(
            tuple(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays),
            torch.from_numpy(targets).to(device, non_blocking=True),
            share.first_row,
            share.rows,
            share.weight,
        )


@contextlib.contextmanager
def _watched(seconds: float) -> Iterator[Callable[[], None]]:
    """Within, a process that does not call what it is given for `seconds` says where each of its
    threads stands and ends: a rank that hangs would hold up all others for ever.

    Winding the clock up starts a thread, so that is done ten times in `seconds` at most.
    """
    slack = seconds / 10
    wound = -slack

    def alive() -> None:
        nonlocal wound
        if (now := time.monotonic()) - wound >= slack:
            wound = now
            faulthandler.dump_traceback_later(seconds + slack, exit=True, file=2)

    alive()
    try:
        yield alive
    finally:
        faulthandler.cancel_dump_traceback_later()


def _say_nothing(line: str) -> None:
    pass
