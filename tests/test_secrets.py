"""What must never be seen: no secret of a cluster is in a log, an answer or a command line."""

import contextlib
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import requests
from ray.job_submission import JobStatus, JobSubmissionClient

from heliostat import cli
from heliostat.local import Cluster
from heliostat.local.home import Home

pytestmark = pytest.mark.cluster
# It uses the secrets, tells Ray of an error of the store in an actor, and ends with another one.
PROGRAM = """
import os, sys, ray
from heliostat import job, storage
def main(root):
    storage.connect(root).write("canary", b"tweet")
    ray.init(log_to_driver=True)
    @ray.remote
    class Reader:
        def read(self):
            print(sorted(os.environ), flush=True)
            return storage.connect(root).read("not there")
    reader = Reader.options(name="canary").remote()
    try:
        ray.get(reader.read.remote())
    except ray.exceptions.RayTaskError as error:
        print(error, flush=True)
    list(storage.connect("s3://no-such-bucket").list())
job.run(main)
"""
ALL = "detail=1&limit=10000"  # of the 100 that are the default, this test's actor may not be one
ANSWERS = (
    "/api/jobs/", "/api/version", "/nodes?view=summary", "/logical/actors", "/api/cluster_status",
    *(f"/api/v0/{kind}?{ALL}" for kind in (
        "actors", "jobs", "nodes", "tasks", "workers", "objects", "placement_groups",
        "runtime_envs")),
    "/api/serve/applications/",
)  # fmt: skip
Wait = Callable[..., None]


@pytest.fixture
def told(cluster: Cluster, bucket: str, tmp_path: Path, wait_until: Wait) -> list[str]:
    """What a job prints that meets secrets and errors, and the message that Ray keeps of it."""
    program = tmp_path / "job.py"
    program.write_text(PROGRAM)
    jobs = JobSubmissionClient()
    platform = Path(cli.__file__).parents[2]
    job = jobs.submit_job(
        entrypoint=shlex.join([sys.executable, str(program), bucket]),
        runtime_env={"env_vars": {"PYTHONPATH": str(platform)}},
    )
    wait_until(lambda: jobs.get_job_status(job).is_terminal(), 120)
    assert jobs.get_job_status(job) == JobStatus.FAILED
    log = jobs.get_job_logs(job)
    assert "AWS_SECRET_ACCESS_KEY" in log
    assert "no-such-bucket" in log
    return [log, jobs.get_job_info(job).message or ""]


def read_secrets(home: Home) -> list[str]:
    return [home.token.read_text().strip(), *json.loads(home.store_keys.read_text()).values()]


def read_if_there(path: Path) -> str:
    """Temporary files of the cluster's processes come and go."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(errors="replace")
    return ""


def read_answers() -> dict[str, str]:
    client = JobSubmissionClient()
    answers = {}
    for path in ANSWERS:
        answer = requests.get(client.get_address() + path, headers=client._headers, timeout=30)
        assert answer.status_code == 200, path
        answers[path] = answer.text
    return answers


def test_no_secret_of_a_cluster_is_in_a_log_an_answer_or_a_command_line(
    cluster: Cluster, told: list[str]
) -> None:
    files = [
        path
        for folder in (cluster.home.logs, cluster.state.scratch)
        for path in folder.rglob("*")
        if path.is_file()
    ]
    answers = read_answers()
    lines = {
        f"process {process.pid}": " ".join(process.info["cmdline"] or ())
        for process in psutil.process_iter(["cmdline"])
    }
    assert len(files) > 20
    assert "canary" in answers[f"/api/v0/actors?{ALL}"]
    assert any("gcs_server" in line for line in lines.values())
    found = {str(path): read_if_there(path) for path in files} | answers | lines
    found["the job"] = "\n".join(told)
    wanted = re.compile("|".join(map(re.escape, read_secrets(cluster.home))))
    assert [place for place, text in found.items() if wanted.search(text)] == []
