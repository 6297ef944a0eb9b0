"""What a training job imports before its workers start: seconds that every run would wait for."""

import subprocess
import sys

PROGRAM = """
import runpy, sys
runpy.run_path("jobs/train.py")
sys.exit("torch" in sys.modules)
"""


def test_the_driver_does_without_pytorch_until_its_workers_are_done() -> None:
    assert subprocess.run([sys.executable, "-c", PROGRAM], check=False).returncode == 0
