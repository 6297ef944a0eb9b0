"""A cluster whose head died: what is said of the job that ran there, and how it goes on."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datasets import store_images
from heliostat import local, storage
from heliostat.local import Cluster, processes
from heliostat.local.home import Home
from heliostat.train import checkpoint

ROWS = {"train": 512, "validation": 32}
STEPS = 4000
SPEC = {
    "name": "tiny",
    "data": {"source": "unused"},
    "model": {"kind": "mlp", "hidden": [8]},
    "train": {"run": "long", "workers": 2, "global_batch": 32, "epochs": 250},
}
PROGRAM = """
import sys
from heliostat import spec, storage
from heliostat.data.manifest import load_manifest
from heliostat.train.launch import train
run = spec.load(sys.argv[1], tuple(sys.argv[2:]))
manifest = load_manifest(storage.connect(run.root), "tiny", "VERSION")
print("ended at step", train(run, manifest).step)
"""
Wait = Callable[..., None]


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster of its own, and this process's environment that of its users."""
    with tempfile.TemporaryDirectory(prefix="heliostat-test-") as directory:
        home = Home(Path(directory) / "home")
        try:
            cluster = local.start(home, free_ports=True)
            for name, value in cluster.env.items():
                monkeypatch.setenv(name, value)
            yield cluster
        finally:
            local.stop(home)


@pytest.mark.faults
def test_no_job_is_said_to_run_once_its_head_died_and_its_training_goes_on(
    mine: Cluster, tmp_path: Path, wait_until: Wait
) -> None:
    store = storage.connect(mine.root)
    version = store_images(store, ROWS).version
    (tmp_path / "own.py").write_text(PROGRAM.replace("VERSION", version))
    (tmp_path / "spec.yaml").write_text(json.dumps({**SPEC, "root": mine.root}))

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "heliostat.cli", *words]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
        )

    def reached() -> int:
        return max((one.step for one in checkpoint.find(store, "long") if one.committed), default=0)

    submit = ("submit", "own.py", "spec.yaml", "train.checkpoint_steps=50")
    begun = run(*submit, "--submission-id", "first", "--detach")
    assert begun.returncode == 0, begun.stderr
    wait_until(lambda: reached() >= 100, 120)
    processes.end(mine.state.marker("ray"), grace_seconds=0)
    away = run("jobs")
    assert away.returncode == 2
    assert len(away.stderr.splitlines()) == 1
    assert local.start(mine.home) == mine
    told = {job["id"]: job["status"] for job in json.loads(run("jobs", "--json").stdout)}
    assert "RUNNING" not in told.values()
    before = reached()
    assert 100 <= before < STEPS
    again = run(*submit, "--submission-id", "second")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"resumed from step {before:,}" in again.stdout
    assert f"ended at step {STEPS}" in again.stdout
