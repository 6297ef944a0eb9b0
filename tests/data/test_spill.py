"""More data than an object store takes: it goes to the disk; if that is full, a sentence comes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("small_store.py")
ROWS = 200_000  # 157 MB, twice what the object store takes


def run(folder: Path, fullest: float) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, str(PROGRAM), str(folder), str(ROWS), str(fullest)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.faults
def test_what_does_not_fit_the_object_store_goes_to_the_disk(tmp_path: Path) -> None:
    ended = run(tmp_path, fullest=0.999)
    assert ended.returncode == 0, ended.stderr
    assert "every pixel came back" in ended.stdout


@pytest.mark.faults
def test_a_disk_that_takes_no_more_ends_the_job_in_a_sentence(tmp_path: Path) -> None:
    ended = run(tmp_path, fullest=0.001)
    assert ended.returncode == 2
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the disk of ")
    assert last.endswith(
        " is full, to which Ray moves what does not fit its object store: free "
        "space there, or use nodes with more memory or larger disks"
    )
    assert not list(tmp_path.glob("root/**/manifest.json"))
