"""The training loop on Ray: a `TorchTrainer` whose workers get rows from Ray Data."""

import json
import os
import secrets
import time
import warnings
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch
import safetensors.torch

from heliostat import spec, storage
from heliostat.data import stream
from heliostat.data.manifest import Manifest
from heliostat.data.order import Order
from heliostat.data.waiting import say_if_waiting
from heliostat.environment import TRAIN, check_cpus
from heliostat.errors import HeliostatError
from heliostat.spec import RunSpec
from heliostat.spec.difference import refuse_changes
from heliostat.storage import Conflict, Store
from heliostat.train import lease, sharded
from heliostat.train.checkpoint import Corrupt
from heliostat.train.gauges import Gauges
from heliostat.train.loop import Ranks
from heliostat.train.rank import Job, Place, Preempted, result_key, train_rank

RESIZE_SECONDS = 30.0

# What may change between two tries of the same run.
_NOT_IDENTITY = {
    "run",
    "force",
    "workers",
    "cpus_per_worker",
    "gpus_per_worker",
    "micro_batch",
    "strategy",
    "recompute",
    "compile",
    "max_failures",
    "hang_seconds",
    "keep_checkpoints",
}


@dataclass(frozen=True)
class Result:
    """What a finished run left behind: `weights` are those to publish, as safetensors bytes."""

    run: str
    step: int
    metrics: dict[str, float]
    weights: bytes


def identify(run: RunSpec, manifest: Manifest) -> str:
    """The run's name: the same model, data and training section resume the same run."""
    if run.train.run:
        return run.train.run
    return f"{run.name}-{spec.digest(_describe(run, manifest))[:12]}"


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
    name = identify(run, manifest)
    order = stream.plan(manifest, "train", run.train.global_batch, run.train.seed)
    steps = count_steps(run, order)
    _register(store, name, _describe(run, manifest), run.train.force)
    ray.init(ignore_reinit_error=True)
    submission = ray.get_runtime_context().get_job_id()
    with lease.hold(store, name, job=submission):
        if (done := _finished(store, name, steps)) is not None:
            print(f"run {name} has ended at step {done.step:,} before", flush=True)
            return done
        _check_cluster(run)
        print(
            f"run {name}: {steps:,} steps of {run.train.global_batch} rows, "
            f"{order.steps_per_epoch:,} steps an epoch, {_say_workers(run)}",
            flush=True,
        )
        job = Job(run, manifest.name, manifest.version, name, steps, secrets.token_hex(8))
        _run_workers(job, store, manifest, order)
    if (result := _finished(store, name, steps)) is None:
        raise HeliostatError(_failure(store, name))
    return result


def _check_cluster(run: RunSpec) -> None:
    total = ray.cluster_resources()
    check_cpus(int(total.get("CPU", 0)), run.train.fewest_workers, run.train.cpus_per_worker)
    gpus = run.train.fewest_workers * run.train.gpus_per_worker
    if gpus > total.get("GPU", 0):
        raise HeliostatError(
            f"train.workers={run.train.fewest_workers} x {run.train.gpus_per_worker} GPU need "
            f"{gpus} GPUs, the cluster has {total.get('GPU', 0):g}: lower train.workers or "
            "train.gpus_per_worker, or use a larger cluster"
        )
    say_if_waiting(run.train.fewest_workers * run.train.cpus_per_worker + 1)


def _say_workers(run: RunSpec) -> str:
    fewest, most = run.train.fewest_workers, run.train.most_workers
    return f"{most} workers" if fewest == most else f"{fewest} to {most} workers"


def _run_workers(job: Job, store: Store, manifest: Manifest, order: Order) -> None:
    store.delete(_failure_key(job.run))
    reader = ray.remote(stream.ChunkReader).options(
        num_cpus=0, max_restarts=-1, name=_reader_name(job)
    )
    actor = reader.remote(store, manifest, "train", order, job.steps)
    try:
        _fit(job)
    except ray.train.TrainingFailedError as error:
        raise HeliostatError(_failure(store, job.run)) from error
    finally:
        ray.kill(actor)


def _fit(job: Job) -> None:
    train = job.spec.train
    for setting in TRAIN:
        os.environ.setdefault(setting.name, setting.value)
    fewest, most = train.fewest_workers, train.most_workers
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"job": job, "submitted": time.time()},
        scaling_config=ray.train.ScalingConfig(
            num_workers=most if fewest == most else (fewest, most),
            use_gpu=train.gpus_per_worker > 0,
            resources_per_worker={"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker},
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=ray.train.RunConfig(
            name=job.run,
            # How often is counted in the bucket: an end that a node's notice caused is no failure.
            failure_config=ray.train.FailureConfig(max_failures=-1),
        ),
    )
    trainer.fit()


def _work(config: dict[str, Any]) -> None:
    """What one worker does; a failure that a retry cannot mend is written down and ends the run."""
    job: Job = config["job"]
    store = storage.connect(job.spec.root)
    if store.stat(_failure_key(job.run)):
        return
    context = ray.train.get_context()
    place = Place(
        Ranks(context.get_world_rank(), context.get_world_size()),
        ray.train.torch.get_device(),
        context.get_local_world_size(),
        stream.fetch_from(ray.get_actor(_reader_name(job))),
        _is_preempted,
        [Gauges(job.run)] if context.get_world_rank() == 0 else [],
    )
    # Said once by every worker of a network with one input channel; it costs nothing here.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    try:
        if place.ranks.rank == 0:
            _count_try(store, job)
        train_rank(job, place)
    except HeliostatError as error:
        store.write(_failure_key(job.run), str(error).encode())
        raise
    except Preempted:
        if place.ranks.rank == 0:
            _write_tries(store, job, _read_tries(store, job) - 1)
        raise


def _is_preempted() -> bool:
    """Whether Ray has told this worker that a node of the run will be taken away.

    Read where Ray keeps it, because `ray.train.get_preemption_info` is a barrier over all workers.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def _count_try(store: Store, job: Job) -> None:
    tries = _read_tries(store, job) + 1
    _write_tries(store, job, tries)
    if tries > job.spec.train.max_failures + 1:
        raise HeliostatError(
            f"the workers of run {job.run} failed {tries - 1} times, train.max_failures is "
            f"{job.spec.train.max_failures}: the job's log has their last words; submit the job "
            "again to go on from the last checkpoint"
        )


def _read_tries(store: Store, job: Job) -> int:
    key = _tries_key(job)
    return int(store.read(key)) if store.stat(key) else 0


def _write_tries(store: Store, job: Job, tries: int) -> None:
    store.write(_tries_key(job), str(tries).encode())


def _describe(run: RunSpec, manifest: Manifest) -> dict[str, Any]:
    """What makes a run this run and no other."""
    return {
        "data": f"{manifest.name}@{manifest.version}",
        "model": run.model.model_dump(mode="json"),
        "train": run.train.model_dump(mode="json", exclude=_NOT_IDENTITY),
    }


def _register(store: Store, name: str, described: dict[str, Any], force: bool) -> None:
    """Write down what the run is, once; with `force` anew if it is changed.

    Raises:
        HeliostatError: a run of this name is another one; names the keys that differ.
    """
    key = f"runs/{name}/run.json"
    try:
        store.create(key, json.dumps(described, indent=1).encode())
    except Conflict:
        if force:
            store.write(key, json.dumps(described, indent=1).encode())
            return
        refuse_changes(name, json.loads(store.read(key)), described)


def _finished(store: Store, name: str, steps: int) -> Result | None:
    """What the run left, if it has ended and was not asked for more steps since."""
    if store.stat(result_key(name)) is None:
        return None
    document = json.loads(store.read(result_key(name)))
    if document["step"] < steps and not document["reason"]:
        return None
    try:
        weights = sharded.read_weights(store, document["checkpoint"])
    except Corrupt:
        return None
    data = safetensors.torch.save(weights.tensors)
    return Result(name, document["step"], document["metrics"], data)


def _failure(store: Store, name: str) -> str:
    if store.stat(_failure_key(name)):
        return store.read(_failure_key(name)).decode()
    return f"run {name} ended without a result: look at the job's log for the workers' last words"


def _reader_name(job: Job) -> str:
    return f"{job.run}-{job.submission}"


def _failure_key(run: str) -> str:
    return f"runs/{run}/failure.txt"


def _tries_key(job: Job) -> str:
    return f"runs/{job.run}/tries/{job.submission}"
