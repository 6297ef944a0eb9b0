"""The training stage beside its peers: seconds a step, to the first step, and back from a kill."""

import contextlib
import gzip
import json
import os
import secrets
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np
import psutil
from ray.job_submission import JobSubmissionClient
from ray.util.state import list_actors
from tensorboardX.proto.event_pb2 import Event

from heliostat import spec, storage
from heliostat.benchmark.stock import Task
from heliostat.benchmark.torchrun import Torchrun, start_torchrun
from heliostat.benchmark.turns import compare, find_paces, take_turns
from heliostat.data.manifest import Manifest
from heliostat.data.prepare import prepare
from heliostat.errors import HeliostatError
from heliostat.spec import MlpSpec, RunSpec
from heliostat.storage import Store
from heliostat.train import checkpoint, goodput
from heliostat.train.goodput import STARTUP
from heliostat.train.rank import CURVE_STEPS

SPEC = "jobs/specs/benchmark.yaml"
SIDE, CLASSES, ROWS = 28, 10, 32_768
STEPS, CHECKPOINT_STEPS, MAX_FAILURES = 300, 50, 3
PACE_STEPS = 4000  # of each side, in turns
SAVED_WIDTHS, SAVES = [784, 2048, 2048, 2048], 7  # 120 MB with what Adam keeps
JOB_SECONDS, LOOK_SECONDS = 300.0, 0.1

Say = Callable[[str], None]
Found = dict[str, dict[str, float | None]]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Peer:
    """A job that trains, and what it leaves in the bucket.

    `has_saved` says whether there is a checkpoint to go on from; `read_steps` when each step ended
    (Unix time), a list for each life of the workers; `explain` where the time before them went.
    """

    name: str
    entrypoint: Sequence[str]
    has_saved: Callable[[], bool]
    read_steps: Callable[[], list[list[float]]]
    explain: Callable[[float], str] = lambda submitted: ""


def measure(root: str, repeats: int, only: str | None, say: Say) -> Found:
    """Measure `only` steps, checkpoint, submit or kill, or all; peers in turn.

    Steps: the mean turn of `repeats` runs of both. A checkpoint: the median of SAVES. A
    submission and a kill: the best of `repeats`.

    All train the same network on the same pictures in two processes of one thread each. A peer
    that fails is None and says why.

    Raises:
        HeliostatError: this is not the root of a checkout, or the data cannot be prepared.
    """
    run = load_spec(root)
    store = storage.connect(run.root)
    pixels, labels = make_pictures()
    upload(store, pixels, labels)
    manifest = prepare(run)
    found: Found = {
        "step_seconds": {"heliostat": None, "torchrun": None},
        "submit_to_first_step_seconds": {"heliostat": None, "stock": None},
        "kill_to_next_step_seconds": {"heliostat": None, "stock": None},
        "checkpoint_stall_seconds": {"heliostat": None, "synchronous": None},
    }

    readings: dict[tuple[str, str], list[float]] = defaultdict(list)

    def keep(figure: str, name: str, seconds: float) -> None:
        say(f"{name:<10} {seconds:>10.4f} s  {figure.removesuffix('_seconds').replace('_', ' ')}")
        readings[figure, name].append(seconds)
        summary = statistics.mean if figure == "step_seconds" else min
        found[figure][name] = summary(readings[figure, name])

    if only in (None, "steps"):
        for _ in range(repeats):
            with _told("steps", say):
                paces = time_steps(store, run, pixels, labels)
                for name in paces:
                    for pace in paces[name]:
                        keep("step_seconds", name, pace)
                ratio, error = compare(paces["heliostat"], paces["torchrun"])
                say(f"a step is {ratio:.3f} +- {error:.3f} of torchrun's, turn beside turn")
    if only in (None, "checkpoint"):
        with _told("checkpoint", say):
            stall, wait, size = run_saving(store.uri, run)
            say(
                f"a checkpoint of {size / 2**20:.0f} MiB from each of {run.train.workers} processes"
            )
            keep("checkpoint_stall_seconds", "heliostat", stall)
            keep("checkpoint_stall_seconds", "synchronous", wait)
    if only in (None, "submit", "kill"):
        for _ in range(repeats):
            for peer in (
                make_platform(store, run, STEPS, CHECKPOINT_STEPS),
                make_stock(store, run, manifest),
            ):
                with _told(peer.name, say):
                    for figure, seconds in time_job(peer, only != "submit", say):
                        keep(figure, peer.name, seconds)
    return found


def load_spec(root: str) -> RunSpec:
    if not Path(SPEC).exists():
        raise HeliostatError(f"there is no {SPEC} here: run this from the root of a checkout")
    return spec.load(SPEC, _overrides(f"{root}/benchmark"))


def make_pictures() -> tuple[Pixels, Pixels]:
    """Noise of (ROWS, SIDE, SIDE) and labels (ROWS,), both bytes."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (ROWS, SIDE, SIDE), np.uint8)
    return pixels, random.integers(0, CLASSES, ROWS, np.uint8)


def upload(store: Store, pixels: Pixels, labels: Pixels) -> None:
    """Put a pair of IDX files below `raw/`, once."""
    arrays = {"train-images-idx3-ubyte.gz": pixels, "train-labels-idx1-ubyte.gz": labels}
    for name, array in arrays.items():
        if store.stat(f"raw/{name}") is None:
            header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            store.write(f"raw/{name}", gzip.compress(header + array.tobytes(), 1, mtime=0))


def make_platform(store: Store, run: RunSpec, steps: int, checkpoint_steps: int | str) -> Peer:
    """`jobs/train.py`, whose event files say when CURVE_POINTS steps between checkpoints ended, or
    every CURVE_STEPS of them where `checkpoint_steps` is "auto"."""
    name = f"benchmark-{secrets.token_hex(4)}"
    settings = {
        "run": name,
        "steps": steps,
        "checkpoint_steps": checkpoint_steps,
        "max_failures": MAX_FAILURES,
    }
    overrides = [f"train.{key}={value}" for key, value in settings.items()]

    def explain(submitted: float) -> str:
        """Where the first attempt says that its workers began and had rows."""
        first = goodput.load_attempts(store, name)[0]
        begun = first.began - submitted
        return f"workers up {begun:.1f} s, first rows {begun + first.seconds[STARTUP]:.1f} s"

    return Peer(
        "heliostat",
        ("jobs/train.py", SPEC, *_overrides(store.uri), *overrides),
        lambda: bool(checkpoint.committed(store, name)),
        lambda: read_events(store, name),
        explain,
    )


def make_stock(store: Store, run: RunSpec, manifest: Manifest) -> Peer:
    """Ray Train and Ray Data over the same shards, see `stock`."""
    assert isinstance(run.model, MlpSpec)
    assert isinstance(run.train.workers, int)
    name = f"stock-{secrets.token_hex(4)}"
    endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL", ""))
    server = {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
    query = f"?{urlencode(server)}" if endpoint.netloc and store.uri.startswith("s3:") else ""
    _, _, bucket = store.uri.rpartition("s3://")
    task = Task(
        files=[f"{bucket}/{shard.key}" for shard in manifest.shards_of("train")],
        folder=f"{store.uri}/stock{query}",
        run=name,
        widths=[SIDE * SIDE, *run.model.hidden, CLASSES],
        lr=run.train.optimizer.lr,
        batch=run.train.global_batch,
        steps=STEPS,
        checkpoint_steps=CHECKPOINT_STEPS,
        workers=run.train.workers,
        max_failures=MAX_FAILURES,
    )

    def read_steps() -> list[list[float]]:
        entries = store.list(f"stock/{name}-steps/")  # among them the mark of a folder
        return [json.loads(store.read(one.key)) for one in entries if one.key.endswith(".json")]

    return Peer(
        "stock",
        ("-m", "heliostat.benchmark.stock", json.dumps(asdict(task))),
        lambda: any(len(ends) >= CHECKPOINT_STEPS for ends in read_steps()),
        read_steps,
    )


def time_job(peer: Peer, with_kill: bool, say: Say) -> Iterator[tuple[str, float]]:
    """Seconds from the submission to the end of the first step, then from a kill to the next one.

    Raises:
        HeliostatError: the job failed, or its workers do not run on this machine.
    """
    submitted = time.time()
    with submit(peer) as job:
        while with_kill and not peer.has_saved():
            if job.poll() is not None:
                raise HeliostatError(f"the job ended before its first checkpoint: {job.tail()}")
            time.sleep(LOOK_SECONDS)
        killed = kill_worker(job.name) if with_kill else 0.0
        job.wait()
    lives = peer.read_steps()
    yield "submit_to_first_step_seconds", lives[0][0] - submitted
    if explained := peer.explain(submitted):
        say(f"{peer.name:<10} {explained}")
    if with_kill:
        after = [ends[0] for ends in lives[1:] if ends[0] > killed]
        if not after:
            raise HeliostatError("the job had ended when its worker was killed")
        yield "kill_to_next_step_seconds", min(after) - killed


def kill_worker(submission: str) -> float:
    """SIGKILL a process that trains for the job; when, Unix time."""
    pids = find_workers(submission)
    if not pids:
        raise HeliostatError("no worker trains on this machine: run this where the workers are")
    killed = time.time()
    psutil.Process(pids[-1]).kill()
    return killed


def find_workers(submission: str) -> list[int]:
    """The processes on this machine that train for the job, which may not be known yet."""
    known = {job.submission_id: job.driver_info for job in JobSubmissionClient().list_jobs()}
    if not (driver := known.get(submission)):
        return []
    wanted = {"class_name": "RayTrainWorker", "state": "ALIVE", "job_id": driver.id}
    actors = list_actors(filters=[(key, "=", value) for key, value in wanted.items()])
    return [actor.pid for actor in actors if psutil.pid_exists(actor.pid)]


class Job:
    """A job that was submitted, and what it has said."""

    def __init__(self, name: str, process: "subprocess.Popen[bytes]", log: Path):
        self.name, self._process, self._log = name, process, log
        self.poll = process.poll

    def tail(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]

    def wait(self) -> None:
        """Raises HeliostatError with the last lines if the job failed or takes JOB_SECONDS."""
        try:
            status = self._process.wait(JOB_SECONDS)
        except subprocess.TimeoutExpired as error:
            message = f"the job did not end within {JOB_SECONDS:g} s: {self.tail()}"
            raise HeliostatError(message) from error
        if status:
            raise HeliostatError(f"the job failed: {self.tail()}")


@contextlib.contextmanager
def submit(peer: Peer) -> Iterator[Job]:
    """The job of `peer` on this cluster; it is stopped in the end if it still runs."""
    name = f"{peer.name}-{secrets.token_hex(4)}"
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job"]
    options = ["--working-dir", ".", "--runtime-env", "jobs/runtime_env.yaml"]
    command = [*ray, "submit", "--submission-id", name, *options, "--", "python", *peer.entrypoint]
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory, "log")
        with log.open("wb") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        try:
            yield Job(name, process, log)
        finally:
            if process.poll() is None:
                subprocess.run([*ray, "stop", name], capture_output=True, check=False)
                process.wait(JOB_SECONDS)


def time_steps(
    store: Store, run: RunSpec, pixels: Pixels, labels: Pixels
) -> dict[str, list[float]]:
    """Seconds a step in each turn of the platform's job and of `plain` under torchrun.

    Raises:
        HeliostatError: one failed; has its last lines.
    """
    peer = make_platform(store, run, PACE_STEPS, "auto")
    with submit(peer) as job:
        while not (workers := find_workers(job.name)):
            if job.poll() is not None:
                raise HeliostatError(f"the job ended before it had workers: {job.tail()}")
            time.sleep(LOOK_SECONDS)
        with start_plain(run, pixels, labels) as plain:
            while len(ranks := find_ranks(plain.pid)) < run.train.most_workers:
                if plain.poll() is not None:
                    plain.wait()
                time.sleep(LOOK_SECONDS)
            turns = take_turns(
                (workers, ranks), lambda: job.poll() is None and plain.poll() is None
            )
            ends = plain.wait()
        job.wait()
    (told,) = peer.read_steps()
    return {
        "heliostat": find_paces(turns, 0, told, CURVE_STEPS),
        "torchrun": find_paces(turns, 1, ends, 1),
    }


def find_ranks(launcher: int) -> list[int]:
    """The processes that torchrun has started."""
    return [child.pid for child in psutil.Process(launcher).children(recursive=True)]


@contextlib.contextmanager
def start_plain(run: RunSpec, pixels: Pixels, labels: Pixels) -> Iterator[Torchrun]:
    """`plain` under torchrun, on the rows as the platform's network gets them."""
    assert isinstance(run.model, MlpSpec)
    with tempfile.TemporaryDirectory() as directory:
        data = str(Path(directory, "data.npz"))
        inputs = (pixels.reshape(ROWS, -1).astype(np.float32) / 255 - 0.5) / 0.25
        np.savez(data, inputs=inputs, labels=labels.astype(np.int64))
        options = {
            "data": data,
            "hidden": run.model.hidden,
            "lr": run.train.optimizer.lr,
            "batch": run.train.global_batch,
            "steps": PACE_STEPS,
            "threads": run.train.cpus_per_worker,
        }
        with start_torchrun(
            "heliostat.benchmark.plain", run.train.most_workers, options
        ) as process:
            yield process


def run_saving(root: str, run: RunSpec) -> tuple[float, float, int]:
    """Seconds that a checkpoint holds up and takes, and its bytes by a process, see `saving`.

    Raises:
        HeliostatError: it failed; has its last lines.
    """
    options = {
        "root": f"{root}/saving",
        "run": f"saving-{secrets.token_hex(4)}",
        "widths": SAVED_WIDTHS,
        "batch": run.train.global_batch // 2,
        "saves": SAVES,
        "threads": run.train.cpus_per_worker,
    }
    with start_torchrun("heliostat.benchmark.saving", run.train.most_workers, options) as process:
        stall, wait, size = process.wait()
    return stall, wait, size


def read_events(store: Store, run: str) -> list[list[float]]:
    """When a run says that its steps ended, Unix time; a list for each attempt that made one."""
    keys = [entry.key for entry in store.list(f"runs/{run}/tensorboard/")]
    lives = []
    for _, files in groupby(sorted(keys), key=lambda key: key.rpartition(".")[0]):
        ends: dict[int, float] = {}
        for event in (event for file in files for event in _parse(store.read(file))):
            if event.HasField("summary"):
                ends.setdefault(event.step, event.wall_time)
        lives += [list(ends.values())] if ends else []
    return lives


def _parse(data: bytes) -> Iterator[Event]:
    """The records of a TFRecord file: a length, its checksum, an event, its checksum."""
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield Event.FromString(data[at + 12 : at + 12 + length])
        at += length + 16


def _overrides(root: str) -> tuple[str, str]:
    return f"root={root}", f"data.source={root}/raw"


@contextlib.contextmanager
def _told(name: str, say: Say) -> Iterator[None]:
    """A peer that fails says why and is left out; the others go on."""
    try:
        yield
    except HeliostatError as error:
        say(f"{name:<10} failed: {error}")
