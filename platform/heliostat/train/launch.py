"""The training loop on Ray: a `TorchTrainer` whose workers get rows from Ray Data."""

import json
import os
import time
import warnings
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from heliostat import metrics, spec, storage
from heliostat.data import features, stream
from heliostat.data.manifest import Manifest, load_manifest
from heliostat.data.order import Order
from heliostat.environment import TRAIN, check_cpus
from heliostat.errors import HeliostatError
from heliostat.models import build, count_parameters, task_of
from heliostat.spec import RunSpec
from heliostat.storage import Conflict, Store
from heliostat.train import checkpoint, loop, state
from heliostat.train.optim import build_optimizer, rate_at

REPORT_SECONDS = 5.0

# What may change between two tries of the same run.
_NOT_IDENTITY = {
    "run",
    "workers",
    "cpus_per_worker",
    "gpus_per_worker",
    "max_failures",
    "keep_checkpoints",
}


@dataclass(frozen=True)
class Result:
    """What a finished run left behind: `weights` are the last step's, as safetensors bytes."""

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
    """Train on the cluster until the last step, resuming what an earlier try committed.

    Raises:
        HeliostatError: the cluster is too small, the data cannot be read or the loss diverged.
    """
    store = storage.connect(run.root)
    name = identify(run, manifest)
    order = stream.plan(manifest, "train", run.train.global_batch, run.train.seed)
    steps = count_steps(run, order)
    _register(store, name, _describe(run, manifest))
    if (done := _finished(store, name, steps)) is not None:
        print(f"run {name} has finished its {steps:,} steps before: nothing to train", flush=True)
        return done
    ray.init(ignore_reinit_error=True)
    workers = run.train.most_workers
    check_cpus(int(ray.cluster_resources().get("CPU", 0)), workers, run.train.cpus_per_worker)
    print(
        f"run {name}: {steps:,} steps of {run.train.global_batch} rows, "
        f"{order.steps_per_epoch:,} steps an epoch, {workers} workers",
        flush=True,
    )
    _say_if_waiting(run)
    store.delete(_failure_key(name))
    reader = ray.remote(stream.ChunkReader).options(num_cpus=0, max_restarts=-1, name=name)
    actor = reader.remote(store, manifest, "train", order, steps)
    try:
        _fit(run, manifest, name, steps)
    except ray.train.TrainingFailedError as error:
        raise HeliostatError(_failure(store, name)) from error
    finally:
        ray.kill(actor)
    if (result := _finished(store, name, steps)) is None:
        raise HeliostatError(_failure(store, name))
    return result


def _say_if_waiting(run: RunSpec) -> None:
    """A run whose CPUs are held by others, as by served models, waits for them: not in silence."""
    free = ray.available_resources().get("CPU", 0)
    needed = run.train.most_workers * run.train.cpus_per_worker + 1
    if free < needed:
        print(
            f"waiting for CPUs: {free:g} of {ray.cluster_resources()['CPU']:g} are free, {needed} "
            "are needed (one to read data); `serve status` and `ray job list` show the others",
            flush=True,
        )


def _describe(run: RunSpec, manifest: Manifest) -> dict[str, Any]:
    """What makes a run this run and no other."""
    return {
        "data": f"{manifest.name}@{manifest.version}",
        "model": run.model.model_dump(mode="json"),
        "train": run.train.model_dump(mode="json", exclude=_NOT_IDENTITY),
    }


def _register(store: Store, name: str, described: dict[str, Any]) -> None:
    """Write down what the run is, once.

    Raises:
        HeliostatError: a run of this name is another one; names the sections that differ.
    """
    key = f"runs/{name}/run.json"
    try:
        store.create(key, json.dumps(described, indent=1).encode())
    except Conflict:
        before = json.loads(store.read(key))
        if changed := [part for part in described if described[part] != before.get(part)]:
            raise HeliostatError(
                f"run {name} was started with another {' and '.join(changed)} section: "
                "choose another train.run, or none to derive one"
            ) from None


def _fit(run: RunSpec, manifest: Manifest, name: str, steps: int) -> None:
    for setting in TRAIN:
        os.environ.setdefault(setting.name, setting.value)
    resources = {"CPU": run.train.cpus_per_worker, "GPU": run.train.gpus_per_worker}
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={
            "spec": spec.dump(run),
            "data": [manifest.name, manifest.version],
            "run": name,
            "steps": steps,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=run.train.most_workers,
            use_gpu=run.train.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=name, failure_config=ray.train.FailureConfig(max_failures=run.train.max_failures)
        ),
    )
    trainer.fit()


def _work(config: dict[str, Any]) -> None:
    """What one worker does; a failure that a retry cannot mend is written down and ends the run."""
    run = spec.parse(config["spec"])
    store = storage.connect(run.root)
    if store.stat(_failure_key(config["run"])):
        return
    try:
        _train_rank(run, load_manifest(store, *config["data"]), config["run"], config["steps"])
    except HeliostatError as error:
        store.write(_failure_key(config["run"]), str(error).encode())
        raise


def _train_rank(run: RunSpec, manifest: Manifest, name: str, steps: int) -> None:
    context = ray.train.get_context()
    ranks = loop.Ranks(context.get_world_rank(), context.get_world_size())
    device = ray.train.torch.get_device()
    store = storage.connect(run.root)
    # Said once by every worker of a network with one input channel; it costs nothing here.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    torch.manual_seed(run.train.seed)
    task = task_of(run.model, manifest.signature)
    model = build(run.model, manifest.signature).to(device)
    optimizer = build_optimizer(run.train.optimizer, model)
    first_step = _resume(store, name, model, optimizer, ranks)
    order = stream.plan(manifest, "train", run.train.global_batch, run.train.seed)
    shares = stream.iter_shares(
        order,
        manifest,
        stream.fetch_from(ray.get_actor(name)),
        steps=range(first_step, steps),
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    recipe = loop.Recipe(
        rate=lambda step: run.train.optimizer.lr * rate_at(run.train.schedule, step, steps),
        seed=run.train.seed,
        clip_norm=run.train.clip_norm,
    )
    reports = loop.fit(
        DistributedDataParallel(model) if ranks.world_size > 1 else model,
        task,
        optimizer,
        (_to_batch(share, manifest, device) for share in shares),
        recipe,
        first_step=first_step,
        ranks=ranks,
    )
    progress = _Progress(steps, order.steps_per_epoch)
    for report in reports:
        if ranks.rank > 0:
            continue
        progress.add(report)
        if report.step % run.train.checkpoint_steps == 0 or report.step == steps:
            files = state.dump_state(model, optimizer, report.step)
            checkpoint.save(store, name, report.step, files)
            checkpoint.retain(store, name, run.train.keep_checkpoints)
            progress.record(store, name)
    if ranks.rank == 0:
        progress.print()
        result = {"step": steps, "parameters": count_parameters(model), "metrics": progress.metrics}
        store.write(_result_key(name), json.dumps(result).encode())


def _resume(
    store: Store,
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: loop.Ranks,
) -> int:
    """Load what rank 0 finds to be the newest good checkpoint, on every rank; returns its step."""
    found = checkpoint.load_newest(store, name, warn=print) if ranks.rank == 0 else None
    keys = [found.key if found else None]
    if ranks.world_size > 1:
        distributed.broadcast_object_list(keys)
    if keys[0] is None:
        return 0
    newest = found or checkpoint.load(store, keys[0])
    step = state.load_state(model, optimizer, newest.files)
    if ranks.rank == 0:
        print(f"resumed from step {step:,} ({newest.key})", flush=True)
    return step


class _Progress:
    """Means since the last line, printed every few seconds and recorded at every checkpoint."""

    def __init__(self, steps: int, steps_per_epoch: int):
        self._steps, self._steps_per_epoch = steps, steps_per_epoch
        self._reports: list[loop.StepReport] = []
        self._since = time.perf_counter()
        self.metrics: dict[str, float] = {}
        self._step = 0

    def add(self, report: loop.StepReport) -> None:
        self._reports.append(report)
        self._step = report.step
        if time.perf_counter() - self._since >= REPORT_SECONDS:
            self.print()

    def print(self) -> None:
        self._summarise()
        epoch = -(-self._step // self._steps_per_epoch)
        values = "  ".join(f"{key} {value:,.4g}" for key, value in self.metrics.items())
        print(f"step {self._step:,}/{self._steps:,}  epoch {epoch}  {values}", flush=True)

    def record(self, store: Store, name: str) -> None:
        """Keep the metrics of now beside the run, where they outlive the cluster."""
        self._summarise()
        document = json.dumps({"step": self._step, **self.metrics}).encode()
        store.write(f"runs/{name}/progress/{self._step:08d}.json", document)

    def _summarise(self) -> None:
        if not self._reports:
            return
        weight = sum(report.weight for report in self._reports)
        rows = sum(report.rows for report in self._reports)
        now = time.perf_counter()
        means = {
            name: sum(report.metrics[name] * report.weight for report in self._reports) / weight
            for name in self._reports[0].metrics
        }
        seconds = max(now - self._since, 1e-9)
        self.metrics = metrics.plain({**means, "rows_per_second": rows / seconds})
        self._reports, self._since = [], now


def _to_batch(share: stream.Share, manifest: Manifest, device: torch.device) -> loop.Batch:
    columns = dict(share.columns)
    arrays = features.encode(manifest.features, columns)
    targets = torch.from_numpy(features.encode_targets(manifest.output, columns))
    inputs = tuple(torch.from_numpy(array).to(device) for array in arrays)
    return loop.Batch(inputs, targets.to(device), share.first_row, share.rows, share.weight)


def _finished(store: Store, name: str, steps: int) -> Result | None:
    if store.stat(_result_key(name)) is None:
        return None
    document = json.loads(store.read(_result_key(name)))
    newest = checkpoint.load_newest(store, name, warn=print)
    if document["step"] != steps or newest is None or newest.step != steps:
        return None
    return Result(name, steps, document["metrics"], newest.files[state.MODEL])


def _failure(store: Store, name: str) -> str:
    if store.stat(_failure_key(name)):
        return store.read(_failure_key(name)).decode()
    return f"run {name} ended without a result: look at the job's log for the workers' last words"


def _result_key(name: str) -> str:
    return f"runs/{name}/result.json"


def _failure_key(name: str) -> str:
    return f"runs/{name}/failure.txt"
