"""`heliostat submit`, `jobs`, `logs`, `stop`, `why`: what the cluster does and why."""

import argparse
import getpass
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliostat.cli.options import (
    Commands,
    add_command,
    add_json,
    add_root,
    open_store,
    point_at_cluster,
)
from heliostat.cli.output import print_now, render_table
from heliostat.errors import HeliostatError, printable

if TYPE_CHECKING:
    from heliostat.spec import RunSpec
    from heliostat.submission.fit import Need
    from heliostat.submission.jobs import Jobs, JobState
    from heliostat.submission.order import Order
    from heliostat.submission.upload import Package

INTERRUPTED = 130
TAIL_LINES = 1000
LAST_LINES = 20
SHOWN_WITHHELD = 5
SUBMIT_HELP = """\
The program itself gets no CPU and no GPU, so that it runs on the head, at once, and not on a
machine that may be taken away: it only starts others and waits. --cpus and --gpus change that."""


def add_commands(commands: Commands) -> None:
    _add_submit(commands)
    command = add_command(
        commands,
        "jobs",
        list_jobs,
        "list the jobs of the cluster, the newest first",
        ["heliostat jobs", "heliostat jobs --json"],
    )
    add_root(command)
    add_json(command)
    command = add_command(
        commands,
        "logs",
        show_logs,
        "print what a job printed",
        ["heliostat logs train-digits-1f2e3d4c", "heliostat logs train-digits-1f2e3d4c -f"],
    )
    _add_job(command)
    command.add_argument(
        "-f", "--follow", action="store_true", help="all of it, until the job ends"
    )
    command.add_argument(
        "--tail",
        type=_natural,
        default=TAIL_LINES,
        metavar="N",
        help=f"the last N lines ({TAIL_LINES}; 0: all)",
    )
    command = add_command(
        commands,
        "stop",
        stop_job,
        "end a job; a training saves its last step first",
        ["heliostat stop train-digits-1f2e3d4c"],
    )
    _add_job(command)
    command = add_command(
        commands,
        "why",
        explain_job,
        "say what a job waits for, or how far it is",
        ["heliostat why train-digits-1f2e3d4c"],
    )
    _add_job(command)
    add_json(command)


def _add_submit(commands: Commands) -> None:
    command = add_command(
        commands,
        "submit",
        submit,
        "check a job, submit it by `ray job submit`, and follow it to its end",
        [
            "heliostat submit train jobs/specs/digits.yaml train.steps=200",
            "heliostat submit jobs/prepare.py jobs/specs/digits.yaml --detach",
            "heliostat submit train big.yaml --cluster-file cluster.yaml job.priority=10",
        ],
    )
    command.description = SUBMIT_HELP
    command.add_argument("job", metavar="JOB", help="a Python file, or one of jobs/ by its name")
    command.add_argument("spec", metavar="SPEC", help="the spec of the run")
    command.add_argument("settings", nargs="*", metavar="key=value", help="changes of the spec")
    command.add_argument("--submission-id", metavar="ID", help="the name of the job")
    command.add_argument("--detach", action="store_true", help="do not follow it")
    command.add_argument(
        "--runtime-env", metavar="FILE", help="(runtime_env.yaml beside the job, if there is one)"
    )
    command.add_argument("--cpus", type=_amount, default=0.0, metavar="N", help="of the program")
    command.add_argument("--gpus", type=_amount, default=0.0, metavar="N", help="of the program")
    command.add_argument(
        "--cluster-file", metavar="FILE", help="what `ray up` was given: which nodes there can be"
    )
    add_json(command)


def submit(options: argparse.Namespace) -> int:
    from heliostat import spec
    from heliostat.submission.fit import check_fit
    from heliostat.submission.jobs import Jobs
    from heliostat.submission.order import find_job, find_spec, refuse_credentials

    folder = Path.cwd()
    job, path = find_job(options.job, folder), find_spec(options.spec, folder)
    run = spec.load(path, tuple(options.settings))
    refuse_credentials(dict(one.split("=", 1) for one in options.settings), "the command line")
    order, packages = _make_order(options, run, job, path)
    say = (lambda line: print(line, file=sys.stderr, flush=True)) if options.json else print_now
    say(_describe_upload(packages))
    point_at_cluster(options)
    jobs = Jobs()
    cluster_file = Path(options.cluster_file) if options.cluster_file else None
    kinds, may_grow = jobs.list_kinds(cluster_file)
    for need in _list_needs(options, run, job):
        if not may_grow:
            check_fit(need, kinds)
    if may_grow:
        say("this cluster grows: what it can have at most is checked with --cluster-file")
    say(f"$ {order.render()}")
    jobs.submit(order)
    told = {
        "id": order.id,
        "command": order.render(),
        "address": jobs.address,
        "upload_bytes": sum(package.size_bytes for package in packages),
    }
    if options.detach:
        print(json.dumps(told) if options.json else f"submitted {order.id}: {_say_next(order.id)}")
        return 0
    say(f"submitted {order.id}, following it (Ctrl-C asks whether to stop it)")
    state = _follow(jobs, order.id, say, sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps({**told, "status": state.status if state else "DETACHED"}))
    return state.exit_status if state else INTERRUPTED


def list_jobs(options: argparse.Namespace) -> None:
    from heliostat.submission.jobs import Jobs

    point_at_cluster(options)
    jobs = Jobs()
    found = jobs.list()
    turns = _read_turns(options, jobs)
    if options.json:
        print(json.dumps([{**_to_json(one), "queue": turns.get(one.ray_job)} for one in found]))
        return
    if not found:
        print("No job has been submitted to this cluster.")
        return
    header = ("job", "status", "what", "started (UTC)", "for", "who", "team", "priority", "queue")
    rows = [(*_to_row(one), turns.get(one.ray_job, "")) for one in found]
    print(printable(render_table(header, rows)))


def _read_turns(options: argparse.Namespace, jobs: "Jobs") -> dict[str, str]:
    """Where the trainings of this cluster stand in the queue of `--root`, by Ray's job id."""
    from heliostat.queue import list_places
    from heliostat.tickets import read_board

    try:
        tickets = read_board(open_store(options), jobs.find_head()).tickets
    except HeliostatError as error:
        print(f"the queue is not shown: {error}", file=sys.stderr)
        return {}
    running = {one.id: f"{one.held} workers" for one in tickets if one.held}
    waiting = {one.id: f"waits as number {place}" for place, one in list_places(tickets)}
    return {name.partition("-")[0]: told for name, told in (running | waiting).items()}


def show_logs(options: argparse.Namespace) -> int:
    from heliostat.submission.jobs import Jobs

    point_at_cluster(options)
    jobs = Jobs()
    state = jobs.require(options.job)
    if options.follow:
        end = _follow(jobs, options.job, print_now, sys.stdout, may_stop=False)
        return end.exit_status if end else INTERRUPTED
    lines = 0
    for text in jobs.read_log(state, options.tail or -1):
        sys.stdout.write(text)
        lines += text.count("\n")
    sys.stdout.flush()
    if not lines:
        print(f"job {state.id} has printed nothing yet ({state.status})", file=sys.stderr)
    elif options.tail and lines >= options.tail:
        print(
            f"(the last {options.tail:,} lines; `heliostat logs {state.id} --tail 0` prints all)",
            file=sys.stderr,
        )
    return 0


def stop_job(options: argparse.Namespace) -> int:
    from heliostat.submission.follow import STOP_SECONDS, stop
    from heliostat.submission.jobs import Jobs

    point_at_cluster(options)
    jobs = Jobs()
    before = jobs.require(options.job)
    if before.has_ended:
        print(f"job {before.id} has ended before: {before.status}")
        return 0
    began = time.monotonic()
    state = stop(jobs, options.job)
    if not state.has_ended:
        print(f"job {state.id} was told to stop and has not within {STOP_SECONDS:g} s: look again")
        return 1
    last = "".join(jobs.read_log(state, LAST_LINES)).splitlines()
    saved = [line[line.index("saved at ") :] for line in last if "saved at step" in line]
    print(f"job {state.id} {state.status} after {time.monotonic() - began:.1f} s", *saved[-1:])
    return 0


def explain_job(options: argparse.Namespace) -> None:
    from heliostat.submission.jobs import Jobs
    from heliostat.submission.reason import explain

    point_at_cluster(options)
    jobs = Jobs()
    state = jobs.require(options.job)
    sentences = explain(jobs.observe(state))
    if options.json:
        print(json.dumps({"id": state.id, "status": state.status, "why": sentences}))
        return
    for sentence in sentences:
        print(f"job {state.id} is {state.status}: {printable(sentence)}")


def _make_order(
    options: argparse.Namespace, run: "RunSpec", job: str, path: str
) -> "tuple[Order, list[Package]]":
    from heliostat.submission.order import (
        RUNTIME_ENV,
        Order,
        check_id,
        name_job,
        read_environment,
    )
    from heliostat.submission.upload import pack

    beside = Path(job).with_name(RUNTIME_ENV)
    file = (
        Path(options.runtime_env) if options.runtime_env else beside if beside.is_file() else None
    )
    environment, is_whole = read_environment(file)
    local = [module for module in environment.get("py_modules") or [] if "://" not in module]
    packages = [pack(Path(folder), environment["excludes"]) for folder in (".", *local)]
    for package in packages:
        package.check()
    for needed in (job, path):
        packages[0].require(needed)
    metadata = {"what": f"{Path(job).stem} {run.name}", "user": getpass.getuser()}
    metadata |= {"priority": str(run.job.priority)} | (
        {"team": run.job.team} if run.job.team else {}
    )
    name = check_id(options.submission_id or name_job(job, run.name))
    words = ("python", job, path, *options.settings)
    return Order(
        name, words, environment, str(file) if file and is_whole else None, metadata,
        options.cpus, options.gpus,
    ), packages  # fmt: skip


def _list_needs(options: argparse.Namespace, run: "RunSpec", job: str) -> "list[Need]":
    from heliostat.submission.fit import Need

    asked = {"CPU": options.cpus, "GPU": options.gpus}
    needs = (
        [Need("the program", asked, remedy="lower --cpus or --gpus")] if any(asked.values()) else []
    )
    if Path(job).stem == "train":
        train = run.train
        needs.append(
            Need(
                "a worker",
                {"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker},
                train.fewest_workers,
                1 + train.validate_async,
                "lower train.workers, train.cpus_per_worker or train.gpus_per_worker, or use a "
                "larger cluster",
            )
        )
    return needs


def _describe_upload(packages: "Sequence[Package]") -> str:
    from heliostat.submission.upload import size

    told = [
        f"{package.folder}: {len(package.files):,} files, {size(package.size_bytes)}"
        for package in packages
    ]
    withheld = [name for package in packages for name in package.withheld]
    more = len(withheld) - SHOWN_WITHHELD
    kept = ", ".join(withheld[:SHOWN_WITHHELD]) + f" and {more} more" * (more > 0)
    return printable(f"upload  {'; '.join(told)}" + f"; stay here: {kept}" * bool(withheld))


def _follow(
    jobs: "Jobs", job: str, say: Any, output: Any, may_stop: bool = True
) -> "JobState | None":
    """The job at its end; None if the user went away from it."""
    from heliostat.submission.follow import Watch

    def show(text: str) -> None:
        output.write(text)
        output.flush()

    watch = Watch(jobs, job, show, say)
    state: JobState | None
    try:
        state = watch.run()
    except KeyboardInterrupt:
        state = _stop_or_leave(jobs, job, say) if may_stop else None
    say(f"job {job} {state.status}" if state else f"\n{job} goes on: {_say_next(job)}")
    return state


def _stop_or_leave(jobs: "Jobs", job: str, say: Any) -> "JobState | None":
    """Ask what Ctrl-C was to mean; without a terminal, at its end or at another Ctrl-C: leave."""
    from heliostat.submission.follow import stop

    if not sys.stdin.isatty():
        return None
    try:
        print(
            f"\nstop {job}, or leave it running? [s / Enter] ", end="", file=sys.stderr, flush=True
        )
        if sys.stdin.readline().strip().lower() not in ("s", "stop"):
            return None
        say(f"stopping {job}: it may take 30 s for what it has to save (Ctrl-C does not wait)")
        return stop(jobs, job)
    except KeyboardInterrupt:
        return None


def _say_next(job: str) -> str:
    return f"`heliostat logs {job} -f` follows it, `heliostat stop {job}` ends it"


def _to_json(state: "JobState") -> dict[str, Any]:
    return {**asdict(state), "duration_seconds": _measure(state)}


def _to_row(state: "JobState") -> tuple[object, ...]:
    started = state.started and datetime.fromtimestamp(state.started, UTC)
    metadata = state.metadata
    return (
        state.id,
        state.status,
        metadata.get("what", state.entrypoint[:60]),
        f"{started:%Y-%m-%d %H:%M}" if started else "",
        _show_duration(_measure(state)),
        metadata.get("user", ""),
        metadata.get("team", ""),
        metadata.get("priority", ""),
    )


def _measure(state: "JobState") -> float | None:
    """Seconds from its start to its end or to now; never negative, should the clocks differ."""
    if state.started is None:
        return None
    return max(0.0, (state.ended or time.time()) - state.started)


def _show_duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


def _add_job(command: argparse.ArgumentParser) -> None:
    command.add_argument("job", metavar="JOB", help="its name, as `heliostat jobs` lists it")


def _natural(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no number of lines")
    return int(text)


def _amount(text: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = -1.0
    if not 0 <= amount < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no amount")
    return amount
