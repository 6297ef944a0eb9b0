"""The whole line on a cluster of its own: raw images in a bucket to answers over HTTP.

python jobs/demo.py
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import numpy as np
import pyarrow as pa

from heliostat import evaluate, keys, local, registry, storage
from heliostat.data.digits import upload_digits
from heliostat.data.manifest import load_manifest
from heliostat.data.shards import read_group, to_columns
from heliostat.errors import HeliostatError
from heliostat.local.home import Home
from heliostat.storage import Store

CHECKOUT = Path(__file__).resolve().parent.parent
SPEC = "jobs/specs/digits.yaml"
STAGES = ("prepare", "train", "evaluate", "deploy")
RAW = "raw/digits"
QUESTIONS = 100
MIN_ACCURACY = 0.95

# What `ray job submit` says of itself, around the output of the job.
SUBMITTER = re.compile(
    r"\s(INFO|SUCC|WARNING) (cli|packaging|working_dir|dashboard_sdk|sdk|worker|job_manager)\.py:"
)


def main() -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="heliostat-demo-") as directory:
        home = Home(Path(directory) / "home")
        try:
            say("starting an S3 store, Ray and Serve on free ports")
            cluster = local.start(home, free_ports=True, report=print)
            os.environ.update(cluster.env)
            store = storage.connect(cluster.root)
            raw = storage.connect(f"{cluster.root}/{RAW}")
            say(f"uploaded {upload_digits(raw):,} raw images to {raw.uri}")
            token, _ = keys.create(store, "the demo", models=("digits",), verbs=("predict",))
            for stage in STAGES:
                submit(stage)
            version = registry.resolve(store, "digits")
            accuracy = registry.list_evaluations(store, version)[0].scores["accuracy"]
            url = f"{cluster.edge_url}/v1/models/digits:predict"
            answered = compare(store, version, url, token)
        finally:
            say("stopping everything")
            local.stop(home)
    if accuracy < MIN_ACCURACY:
        raise HeliostatError(f"test accuracy {accuracy:.4f} is below {MIN_ACCURACY}")
    if answered < QUESTIONS:
        raise HeliostatError(
            f"only {answered} of {QUESTIONS} answers equal the offline predictions"
        )
    print(
        f"demo ok: test accuracy {accuracy:.4f}, {answered}/{QUESTIONS} HTTP answers equal "
        f"the offline predictions, {time.monotonic() - began:.0f} s",
        flush=True,
    )


def submit(stage: str) -> None:
    """Run a stage as a user would; its output goes to the terminal.

    Raises:
        HeliostatError: the job did not succeed.
    """
    say(f"ray job submit ... python jobs/{stage}.py {SPEC}")
    ray = str(Path(sys.executable).with_name("ray"))
    options = ["--working-dir", ".", "--runtime-env", "jobs/runtime_env.yaml"]
    command = [ray, "job", "submit", *options, "--", "python", f"jobs/{stage}.py", SPEC]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=PIPE, stderr=STDOUT, text=True) as job:
        assert job.stdout is not None
        try:
            for line in job.stdout:
                if line.strip() and not SUBMITTER.search(line):
                    print(line, end="", flush=True)
        except BaseException:
            job.terminate()
            raise
    if job.returncode:
        raise HeliostatError(f"the {stage} job failed, its output above says why")


def compare(store: Store, version: registry.Version, url: str, token: str) -> int:
    """Send held-out raw files over HTTP; how many answers equal the offline predictions."""
    manifest = load_manifest(store, version.data_name, version.data_version)
    shards = manifest.shards_of("test")
    groups = [read_group(store, s, index) for s in shards for index in range(len(s.groups))]
    rows = pa.concat_tables(groups).slice(0, QUESTIONS)
    offline = evaluate.predict(
        evaluate.load_predictor(store, version), to_columns(manifest.features, rows)
    )
    labels = version.output["labels"]
    equal = 0
    for key, expected in zip(rows["id"].to_pylist(), offline, strict=True):
        answer = ask(url, store.read(f"{RAW}/{key}"), token)
        online = np.array([answer["probabilities"][label] for label in labels])
        same_class = answer["class"] == labels[int(expected.argmax())]
        equal += same_class and bool(np.allclose(online, expected, atol=1e-5))
    return equal


def ask(url: str, image: bytes, token: str) -> dict[str, Any]:
    headers = {"Content-Type": "image/png", "Authorization": f"Bearer {token}"}
    request = urllib.request.Request(url, image, headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        answer: dict[str, Any] = json.load(response)["predictions"][0]
    return answer


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except HeliostatError as error:
        sys.exit(f"demo failed: {error}")
    except KeyboardInterrupt:
        sys.exit("demo stopped: interrupted, everything it started is stopped too")
