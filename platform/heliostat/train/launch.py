"""A run from its driver: workers of Ray Train that get their rows from Ray Data."""

import contextlib
import os
import secrets
import threading
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError

from heliostat import pools, storage
from heliostat.data import stream
from heliostat.data.manifest import Manifest
from heliostat.data.order import Order
from heliostat.data.waiting import say_if_waiting
from heliostat.environment import TRAIN, check_cpus
from heliostat.errors import HeliostatError
from heliostat.origin import digest_weights
from heliostat.queue import Amount
from heliostat.spec import RunSpec
from heliostat.storage import Missing, Store
from heliostat.storage.documents import Damaged, read_document
from heliostat.train import checkpoint, lease, scoring
from heliostat.train.ahead import look_ahead
from heliostat.train.allotment import allot, find_allotment, forget
from heliostat.train.avoided import select_others, sum_resources
from heliostat.train.checkpoint import Corrupt
from heliostat.train.failures import Failures
from heliostat.train.identity import describe, identify, register
from heliostat.train.job import Ended, Job, failure_key, result_key
from heliostat.train.scoring import Scorer
from heliostat.train.trainer import MeetingConfig, Trainer, find_scratch
from heliostat.train.turn import Turn, line_up, list_largest

RESIZE_SECONDS = 30.0
# Of the 30 s that a job is given to end (RAY_JOB_STOP_WAIT_TIME_S).
SAVE_SECONDS = 25.0
MAX_WORDS = 300


@dataclass(frozen=True)
class Result:
    """What a finished run left behind: `weights` are those to publish, as safetensors bytes."""

    run: str
    step: int
    metrics: dict[str, float]
    weights: bytes


def count_steps(run: RunSpec, order: Order) -> int:
    total = run.train.epochs * order.steps_per_epoch
    return min(total, run.train.steps or total)


def train(run: RunSpec, manifest: Manifest) -> Result:
    """Train on the cluster until the run ends, resuming what an earlier try committed.

    Raises:
        HeliostatError: the cluster is too small, another job writes the run, the data cannot be
            read, the loss diverged, or the workers failed too often.
    """
    store = storage.connect(run.root)
    weights = digest_weights(run.model.init) if run.model.init else None
    described = describe(run, manifest, weights)
    name = identify(store, run, described)
    order = stream.plan(manifest, "train", run.train.global_batch, run.train.seed)
    steps = count_steps(run, order)
    ray.init(ignore_reinit_error=True)
    submission = ray.get_runtime_context().get_job_id()
    with lease.hold(store, name, job=submission):
        register(store, name, run, described)
        scorer = Scorer(run, manifest, name) if run.train.validate_async else None
        if (done := _finished(store, name, steps, scorer)) is not None:
            print(f"run {name} has ended at step {done.step:,} before", flush=True)
            return done
        _check_validation(run, manifest)
        _check_cluster(run)
        print(
            f"run {name}: {steps:,} steps of {run.train.global_batch} rows, "
            f"{order.steps_per_epoch:,} steps an epoch, {_say_workers(run)}",
            flush=True,
        )
        with line_up(store, run, name) as turn, look_ahead(run, manifest, store) as ahead:
            read_bytes = None
            while read_bytes is None:
                job = Job(
                    run,
                    manifest.name,
                    manifest.version,
                    name,
                    steps,
                    submission=secrets.token_hex(8),
                    weights=weights,
                )
                allot(job, turn.wait())
                if not pools.find_pool("training"):
                    say_if_waiting(_count_cpus(run))
                with scoring.beside(scorer) if scorer else contextlib.nullcontext():
                    read_bytes = _run_workers(job, store, manifest, order, turn)
                turn.give_back()
            if (result := _finished(store, name, steps, scorer)) is None:
                raise HeliostatError(_failure(store, job))
            ahead.keep(name, read_bytes)
    return result


def _check_validation(run: RunSpec, manifest: Manifest) -> None:
    if (run.train.validate_steps or run.train.validate_async) and not manifest.rows["validation"]:
        raise HeliostatError(
            "train.validate_steps and train.validate_async read the validation split, which has no "
            "rows: set data.split.validation and prepare the data again, or leave them out"
        )


def _check_cluster(run: RunSpec) -> None:
    train = run.train
    total = sum_resources(train.avoid_nodes)
    workers, scored = train.fewest_workers, train.validate_async
    if pool := pools.find_pool("training"):
        _check_pool(run, pool)
        return
    check_cpus(int(total.get("CPU", 0)), workers, train.cpus_per_worker, scored)
    gpus = workers * train.gpus_per_worker
    if gpus > total.get("GPU", 0):
        raise HeliostatError(
            f"train.workers={workers} x {train.gpus_per_worker} GPU need {gpus} GPUs, the cluster "
            f"has {total.get('GPU', 0):g}: lower train.workers or train.gpus_per_worker, or use a "
            "larger cluster"
        )


def _count_cpus(run: RunSpec) -> int:
    """What the smallest set of workers takes, with what reads their rows and scores."""
    train = run.train
    return train.fewest_workers * train.cpus_per_worker + 1 + train.validate_async


def _check_pool(run: RunSpec, most: pools.Most) -> None:
    """Nodes that are not there yet may come, but no more than the pool takes."""
    train = run.train
    worker = Amount(train.cpus_per_worker, train.gpus_per_worker)
    places = list_largest(most).count_places(worker)
    if train.fewest_workers > places:
        raise HeliostatError(
            f"train.workers={train.fewest_workers} of {worker} each are more than the training "
            f"pool can hold: {places}, on {most.machines} machines of "
            f"{Amount(most.cpus, most.gpus)} at most: lower train.workers, or raise "
            "training.max_workers of the cluster"
        )


def _say_workers(run: RunSpec) -> str:
    fewest, most = run.train.fewest_workers, run.train.most_workers
    return f"{most} workers" if fewest == most else f"{fewest} to {most} workers"


def _run_workers(
    job: Job, store: Store, manifest: Manifest, order: Order, turn: Turn
) -> int | None:
    """The bytes read from the bucket until the end of the run; None if its turn was over before."""
    read = (store, manifest, "train", order, job.steps, job.spec.train.cache_share)
    try:
        with stream.start_reader(*read, max_restarts=-1, name=job.reader) as reader:
            # The rows of the first step are on their way while the workers start.
            reader.chunk.remote(order.locate(_reached(store, job))[0])
            with turn.follow(job):
                _fit_until_stopped(job, turn)
            read_bytes: int = ray.get(reader.read_bytes.remote())
            return read_bytes
    except ray.train.TrainingFailedError as error:
        if turn.is_over and store.stat(failure_key(job)) is None:
            return None
        raise HeliostatError(_failure(store, job, error)) from error
    except RayActorError as error:
        raise HeliostatError(
            f"Ray's controller of run {job.run} died: submit the job again to go on from the last "
            "checkpoint"
        ) from error


def _reached(store: Store, job: Job) -> int:
    """The step that the workers will most likely go on from."""
    found = [one.step for one in checkpoint.find(store, job.run) if one.committed]
    return min(max(found, default=0), job.steps - 1)


def _fit_until_stopped(job: Job, turn: Turn) -> None:
    """Where the job is told to end (Ctrl-C, SIGTERM), the workers first save where they are."""
    fitting = Future[None]()

    def run() -> None:
        try:
            _fit(job)
            fitting.set_result(None)
        except BaseException as error:
            fitting.set_exception(error)

    threading.Thread(target=run, name="fit", daemon=True).start()
    try:
        fitting.result()
    except (KeyboardInterrupt, SystemExit):
        if not fitting.done():
            print("told to end: saving where the run is", flush=True)
            turn.end(job)
            wait([fitting], SAVE_SECONDS)
        raise
    finally:
        forget(job)


def _fit(job: Job) -> None:
    train = job.spec.train
    for setting in TRAIN:
        os.environ.setdefault(setting.name, setting.value)
    fewest, most = train.fewest_workers, train.most_workers
    allotted = partial(find_allotment, job)
    trainer = Trainer(
        _work,
        train_loop_config={"job": job},
        backend_config=MeetingConfig(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=most if fewest == most else (fewest, most),
            use_gpu=train.gpus_per_worker > 0,
            label_selector=select_others(train.avoid_nodes),
            resources_per_worker={
                "CPU": train.cpus_per_worker,
                "GPU": train.gpus_per_worker,
                **pools.ask("training"),
            },
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=ray.train.RunConfig(name=job.run, storage_path=find_scratch()),
        failures=Failures(job, allotted),
        allotted=allotted,
        avoided=train.avoid_nodes,
    )
    trainer.fit()


def _work(config: dict[str, Any]) -> None:
    """What a worker runs. Imported there: the driver and Ray's controller do without PyTorch."""
    from heliostat.train.worker import work

    work(config["job"])


def _finished(store: Store, name: str, steps: int, scorer: Scorer | None) -> Result | None:
    """What the run left, if it has ended and was not asked for more steps since."""
    try:
        ended = read_document(store, result_key(name), Ended)
    except (Missing, Damaged):  # its newest checkpoint has all that it takes to end once more
        return None
    if ended.step < steps and not ended.reason:
        return None
    # PyTorch takes seconds to import, and before the first step the driver does not need it.
    import safetensors.torch

    from heliostat.train.reader import read_weights

    key = (scorer.find_best() if scorer else None) or ended.checkpoint or ""
    try:
        weights = read_weights(store, key)
    except Corrupt as error:
        print(f"passing over checkpoint {key}: {error}; the run ends once more", flush=True)
        checkpoint.revoke(store, key)
        return None
    data = safetensors.torch.save(weights.tensors)
    return Result(name, ended.step, ended.metrics, data)


def _failure(store: Store, job: Job, error: Exception | None = None) -> str:
    if store.stat(failure_key(job)):
        return store.read(failure_key(job)).decode()
    words = f" ({' '.join(str(error).split())[:MAX_WORDS]})" if error else ""
    return (
        f"run {job.run} ended without a result{words}: submit the job again to go on from the last "
        "checkpoint, and look at its log for more"
    )
