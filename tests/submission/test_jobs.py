"""The commands around jobs against a real cluster, as a user types them."""

import json
import os
import pty
import re
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_actors

from heliostat.local import Cluster
from heliostat.submission.jobs import Jobs

pytestmark = pytest.mark.cluster
PROGRAM = """
import pathlib, signal, sys, time
def save(*_):
    print("saved at step 7, as told", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("it is", pathlib.Path("jobs/spec.yaml").read_text().split()[1], flush=True)
how = sys.argv[-1]
if how == "job.team=waits":
    time.sleep(600)
if how == "job.team=fails":
    sys.exit(3)
if how == "job.team=floods":
    end = time.monotonic() + 10
    n = 0
    while time.monotonic() < end:
        for _ in range(100):
            n += 1
            print("line", n, "x" * 60)
        time.sleep(0.01)
    print("the last of", n, flush=True)
"""
Wait = Callable[..., None]


@pytest.fixture
def folder(tmp_path: Path, cluster: Cluster) -> Path:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/program.py").write_text(PROGRAM)
    (tmp_path / "jobs/spec.yaml").write_text("name: mine\ndata: {source: x}\nmodel: {kind: mlp}\n")
    (tmp_path / ".env").write_text("PASSWORD=x")
    return tmp_path


@pytest.fixture
def name() -> str:
    return f"test-{secrets.token_hex(4)}"


def run(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "heliostat.cli", *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


def submit(folder: Path, name: str, how: str, *options: str) -> "subprocess.CompletedProcess[str]":
    words = ["submit", "program", "jobs/spec.yaml", f"job.team={how}", "--submission-id", name]
    return run(folder, *words, *options)


def test_a_job_is_followed_to_its_end_and_ends_as_it_does(folder: Path, name: str) -> None:
    ended = submit(folder, name, "fails")
    assert ended.returncode == 3
    first, command, *_ = ended.stdout.splitlines()
    assert first.startswith("upload  .: 2 files,")
    assert first.endswith("; stay here: .env")
    assert command.startswith(f"$ ray job submit --submission-id {name} --working-dir . ")
    assert "\nit is mine\n" in ended.stdout
    assert f"\njob {name} FAILED\n" in ended.stdout
    assert "INFO" not in ended.stderr
    again = submit(folder, name, "fails")
    assert (again.returncode, again.stdout.count("submitted")) == (2, 0)
    assert f"there is a job {name} already (FAILED)" in again.stderr
    assert "it has ended: FAILED" in run(folder, "why", name).stdout


def test_a_detached_job_is_listed_explained_printed_and_stopped(
    folder: Path, name: str, wait_until: Wait
) -> None:
    begun = submit(folder, name, "waits", "--detach", "--json")
    told = json.loads(begun.stdout)
    assert (told["id"], begun.returncode) == (name, 0)
    wait_until(lambda: "it is mine" in run(folder, "logs", name).stdout, 60)
    (listed,) = (
        one for one in json.loads(run(folder, "jobs", "--json").stdout) if one["id"] == name
    )
    assert (listed["status"], listed["metadata"]["team"]) == ("RUNNING", "waits")
    assert re.search(rf"{name} +RUNNING +program mine ", run(folder, "jobs").stdout)
    why = json.loads(run(folder, "why", name, "--json").stdout)["why"]
    assert why == ["it runs; the last it said: it is mine"]
    stopped = run(folder, "stop", name)
    assert f"job {name} STOPPED" in stopped.stdout
    assert "saved at step 7" in stopped.stdout
    assert "has ended before" in run(folder, "stop", name).stdout
    assert run(folder, "logs", name, "-f").returncode == 143


def test_what_can_never_run_is_refused_with_the_numbers(folder: Path, name: str) -> None:
    refused = submit(folder, name, "waits", "--gpus", "8")
    assert refused.returncode == 2
    assert "the program needs 8 GPU, and no node of this cluster can have that" in refused.stderr
    assert Jobs().find(name) is None


def test_a_job_that_waits_for_room_is_pending_with_its_reason(
    folder: Path, name: str, cluster: Cluster, wait_until: Wait
) -> None:
    cpus = cluster.state.bounds.logical_cpus
    first, second = f"{name}-a", f"{name}-b"
    submit(folder, first, "waits", "--detach", "--cpus", str(cpus))
    wait_until(lambda: "it is mine" in run(folder, "logs", first).stdout, 60)
    submit(folder, second, "waits", "--detach", "--cpus", "1")
    told = ""

    def has_reason() -> bool:
        nonlocal told
        told = run(folder, "why", second).stdout
        return "its program needs 1 x 1 CPU: it waits until that is free" in told

    try:
        wait_until(has_reason, 60)
        assert "is PENDING" in told
    finally:
        run(folder, "stop", first)
        run(folder, "stop", second)


@pytest.mark.faults
def test_a_program_that_never_gets_its_place_fails_in_time_and_leaves_nothing(
    folder: Path, name: str, wait_until: Wait
) -> None:
    """Sent by Ray's own client, which does not ask what the nodes have."""
    client = JobSubmissionClient()
    client.submit_job(
        entrypoint="true", submission_id=name, entrypoint_resources={"nobody-has-this": 1}
    )
    wait_until(lambda: "nobody-has-this" in run(folder, "why", name).stdout, 60)
    wait_until(lambda: client.get_job_status(name) == JobStatus.FAILED, 180)
    assert "within 120.0 seconds" in client.get_job_info(name).message
    assert "it has ended: FAILED" in run(folder, "why", name).stdout
    wait_until(lambda: find_supervisors(name) <= {"DEAD"}, 60)


def find_supervisors(name: str) -> set[str]:
    """The states of the actors that watch over the job."""
    actors = list_actors(
        filters=[("class_name", "=", "JobSupervisor")],
        detail=True,
        limit=1000,
        raise_on_missing_output=False,
    )
    return {actor.state for actor in actors if name in actor.name}


@pytest.mark.faults
def test_a_flood_of_lines_is_read_from_its_end_and_says_so(folder: Path, name: str) -> None:
    assert submit(folder, name, "floods", "--detach").returncode == 0
    assert run(folder, "logs", name, "-f").returncode == 0
    tail = run(folder, "logs", name, "--tail", "5")
    lines = tail.stdout.splitlines()
    assert len(lines) == 5
    assert lines[-1].startswith("the last of ")
    assert int(lines[-1].split()[-1]) > 20_000
    assert "the last 5 lines" in tail.stderr


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.leader, follower = pty.openpty()
        command = [sys.executable, "-m", "heliostat.cli", *arguments]
        self.process = subprocess.Popen(
            command, cwd=folder, stdin=follower, stdout=follower, stderr=follower,
            start_new_session=True,
        )  # fmt: skip
        os.close(follower)
        self.text = ""

    def wait_for(self, words: str, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < deadline, f"{words!r} is not in {self.text!r}"
            if select.select([self.leader], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self.leader, 65536).decode(errors="replace")
                except OSError as error:  # the other end is closed
                    raise AssertionError(f"{words!r} is not in {self.text!r}") from error

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def answer(self, text: str) -> None:
        os.write(self.leader, text.encode())


@pytest.fixture
def terminal(folder: Path, name: str) -> Iterator[Terminal]:
    words = ("submit", "program", "jobs/spec.yaml", "job.team=waits", "--submission-id", name)
    opened = Terminal(folder, *words)
    opened.wait_for("it is mine")
    yield opened
    opened.process.kill()
    opened.process.wait()
    os.close(opened.leader)
    run(folder, "stop", name)


def test_ctrl_c_asks_and_stops(terminal: Terminal, name: str) -> None:
    terminal.interrupt()
    terminal.wait_for(f"stop {name}, or leave it running?")
    terminal.answer("s\n")
    terminal.wait_for(f"job {name} STOPPED")
    assert terminal.process.wait(30) == 143


@pytest.mark.parametrize("then", ["enter", "interrupt"])
def test_ctrl_c_and_enter_or_ctrl_c_again_leave_the_job(
    terminal: Terminal, name: str, then: str
) -> None:
    terminal.interrupt()
    terminal.wait_for("or leave it running?")
    if then == "enter":
        terminal.answer("\n")
    else:
        terminal.interrupt()
    terminal.wait_for(f"{name} goes on: `heliostat logs {name} -f` follows it")
    assert terminal.process.wait(30) == 130
    state = Jobs().find(name)
    assert state is not None
    assert state.status == "RUNNING"


def test_ctrl_c_without_a_terminal_leaves_the_job_and_says_how_to_stop_it(
    folder: Path, name: str, wait_until: Wait
) -> None:
    command = [sys.executable, "-m", "heliostat.cli", "submit", "program", "jobs/spec.yaml"]
    process = subprocess.Popen(
        [*command, "job.team=waits", "--submission-id", name],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: "it is mine" in run(folder, "logs", name).stdout, 60)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"`heliostat stop {name}` ends it" in told
    assert "STOPPED" in run(folder, "stop", name).stdout
