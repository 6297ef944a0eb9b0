"""The real parts that tests share: an S3 server, a laptop cluster, and patience with a deadline."""

import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from heliostat import local
from heliostat.environment import LOOPBACK
from heliostat.local import processes
from heliostat.local.home import Home, furnish

# The laptop's Ray talks on 127.0.0.1 only; `ray start --address` cannot join that, its node can.
JOIN = """
import sys
from ray._private.node import Node
from ray._private.parameter import RayParams
gcs, scratch, cpus = sys.argv[1:]
Node(RayParams(gcs_address=gcs, node_ip_address="127.0.0.1", num_cpus=int(cpus),
     object_store_memory=10**8, min_worker_port=0, max_worker_port=0, temp_dir=scratch),
     head=False, shutdown_at_exit=False, spawn_reaper=False)
"""
# Two busy cores: how long an example takes says nothing about the code.
settings.register_profile("heliostat", deadline=None)
settings.load_profile("heliostat")

HOME = Home(Path(tempfile.mkdtemp(prefix="heliostat-test-")))
furnish(HOME)
# What Ray reads when it is imported, which test modules do before any fixture runs.
os.environ[LOOPBACK.name] = LOOPBACK.value
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN_PATH"] = str(HOME.token)

# SIGTERM ends a run like Ctrl-C, so that the fixtures still stop what they started.
signal.signal(signal.SIGTERM, signal.default_int_handler)
# A shell ignores it in what it runs in the background, and tests interrupt what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A replica answers for so long after its successor does (30 s by default): proxies hear of it late.
os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "5"


def pytest_unconfigure() -> None:
    shutil.rmtree(HOME.path)


@pytest.fixture(scope="session")
def home() -> Iterator[Home]:
    """The home of the session's cluster; whatever was started in it ends with the session."""
    yield HOME
    local.stop(HOME)


@pytest.fixture(scope="session")
def s3(home: Home) -> Iterator[local.Cluster]:
    """A real S3 server without Ray; this process's environment points at it."""
    yield from _enter(local.start(home, free_ports=True, with_ray=False))


@pytest.fixture(scope="session")
def cluster(home: Home, s3: local.Cluster) -> Iterator[local.Cluster]:
    """A whole laptop cluster on the server of `s3`; this process's environment points at it."""
    yield from _enter(local.start(home, report=print))
    import ray  # reads this process's environment

    ray.shutdown()  # a driver whose raylet goes ends its own process


@pytest.fixture
def join_node(cluster: local.Cluster) -> Iterator[Callable[..., str]]:
    """`join_node(cpus, **settings)`: a second raylet here; the marker of its processes."""
    scratch = Path(tempfile.mkdtemp(prefix="heliostat-", dir="/tmp"))
    marker = secrets.token_hex(8)

    def join(cpus: int, **settings: str) -> str:
        command = [sys.executable, "-c", JOIN, cluster.gcs_address, str(scratch), str(cpus)]
        environment = {**os.environ, **cluster.env, **settings}
        processes.launch(marker, command, environment, scratch / "join.log")
        return marker

    yield join
    processes.end(marker, grace_seconds=1)
    shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture
def bucket(s3: local.Cluster) -> str:
    """A fresh URI in the bucket of `s3`, empty and of this test alone."""
    return f"{s3.root}/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """`wait_until(condition, seconds=30)`: poll until it holds, fail at the deadline."""

    def wait(condition: Callable[[], object], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"did not hold within {seconds} s"
            time.sleep(0.05)

    return wait


def _enter(cluster: local.Cluster) -> Iterator[local.Cluster]:
    with pytest.MonkeyPatch.context() as environment:
        for name, value in cluster.env.items():
            environment.setenv(name, value)
        yield cluster
