"""How a job ends: with a sentence, or unwound by the signal that `ray job stop` sends."""

import subprocess
import sys

JOB = """
import os, signal
from heliostat.errors import HeliostatError
from heliostat.job import run
def main(path):
    try:
        os.kill(os.getpid(), signal.SIGTERM) if path == "stopped" else None
        raise HeliostatError("too large" if path == "spec.yaml" else path)
    finally:
        print("taken back")
run(main)
"""


def start(path: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", JOB, path]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_job_that_is_stopped_unwinds() -> None:
    ended = start("stopped")
    assert (ended.returncode, ended.stdout, ended.stderr) == (143, "taken back\n", "")


def test_a_refused_job_is_one_sentence() -> None:
    ended = start("spec.yaml")
    assert (ended.returncode, ended.stderr) == (2, "error: too large\n")


def test_what_a_sentence_quotes_cannot_move_the_cursor() -> None:
    ended = start("the column \x1b[2Jé\u202e is unknown")
    assert ended.stderr == "error: the column \\x1b[2Jé\\u202e is unknown\n"
