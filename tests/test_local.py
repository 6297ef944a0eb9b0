"""The laptop cluster: private, on loopback, ended exactly, its data kept until it is purged."""

import os
import secrets
import socket
import stat
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError

from heliostat import local
from heliostat.environment import PREFERRED_PORTS, STORE_PORT_OFFSET
from heliostat.errors import HeliostatError
from heliostat.local import head, machine, processes
from heliostat.local.edge import find_haproxy
from heliostat.local.home import MARKER_FILE, Home, furnish, read_store_keys

WaitUntil = Callable[..., None]


@pytest.fixture
def new_home() -> Iterator[Home]:
    """A home that does not exist yet; whatever a test starts in it is stopped."""
    with tempfile.TemporaryDirectory(prefix="heliostat-test-") as directory:
        home = Home(Path(directory) / "home")
        yield home
        local.stop(home)


def open_s3(cluster: local.Cluster, **credentials: Any) -> Any:
    return boto3.Session().client(
        "s3", endpoint_url=cluster.s3_url, region_name="us-east-1", **credentials
    )


def open_own_s3(cluster: local.Cluster) -> Any:
    keys = read_store_keys(cluster.home)
    return open_s3(
        cluster, aws_access_key_id=keys.access_key, aws_secret_access_key=keys.secret_key
    )


def list_processes(cluster: local.Cluster) -> list[psutil.Process]:
    return [
        process
        for part in local.PARTS
        for process in processes.find(cluster.state.marker(part.name))
    ]


def list_open_ports(cluster: local.Cluster) -> set[tuple[str, int]]:
    """(interface, port) of everything that a process of `cluster` listens on."""
    found = set()
    for process in list_processes(cluster):
        with suppress(psutil.Error):
            found |= {
                (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
                for connection in process.net_connections("inet")
                if connection.status == psutil.CONN_LISTEN
            }
    return found


def ask(url: str, token: str | None = None) -> int:
    """The HTTP status of a GET."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as r:
            return int(r.status)
    except urllib.error.HTTPError as error:
        return error.code


# Processes: exactly what carries the marker ends.


def test_only_what_carries_the_marker_ends_with_all_its_descendants(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    marker = secrets.token_hex(8)
    script = "trap '' TERM; env -i sleep 60 & sleep 60 & wait; wait"
    stubborn = processes.launch(marker, ["bash", "-c", script], os.environ, tmp_path / "log")
    other = processes.launch(f"{marker}x", ["sleep", "60"], os.environ, tmp_path / "log")
    try:
        wait_until(lambda: len(processes.find(marker)) == 3)
        ended = processes.end(marker, grace_seconds=0.2)
        assert stubborn.pid in ended
        assert len(ended) == 3
        assert processes.find(marker) == []
        assert other.poll() is None
    finally:
        for process in (other, stubborn):
            process.kill()
            process.wait()


def test_a_process_that_ends_after_it_was_found_has_a_name(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    marker = secrets.token_hex(8)
    with processes.launch(marker, ["sleep", "60"], os.environ, tmp_path / "log") as sleeper:
        wait_until(lambda: processes.find(marker))
        found = processes.find(marker)
        sleeper.kill()
    assert [process.info["name"] for process in found] == ["sleep"]


def test_the_environment_of_ray_holds_no_credentials_of_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    foreign = ("AWS_SESSION_TOKEN", "AWS_PROFILE", "RAY_ADDRESS", "RAY_AUTH_TOKEN")
    for name in foreign:
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "60")
    environment = processes.clean_environment()
    assert not environment.keys() & set(foreign)
    assert environment["RAY_JOB_STOP_WAIT_TIME_S"] == "60"


# Ports.


def test_a_taken_port_is_refused_with_its_number_and_purpose() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(HeliostatError, match=rf"port {port} \(S3\).*--free-ports"):
            machine.check_free([("S3", port)])
    machine.check_free([("S3", port)])


def test_picked_ports_are_free_and_distinct() -> None:
    ports = machine.pick_ports(20)
    assert len(set(ports)) == 20
    assert all(map(machine.is_free, ports))


def test_no_port_is_picked_that_a_preferred_one_takes_as_well() -> None:
    assert PREFERRED_PORTS["s3"] + STORE_PORT_OFFSET not in machine.PICKED_PORTS


# The store.


def test_secrets_are_readable_by_their_owner_only(s3: local.Cluster) -> None:
    home = s3.home
    assert home.path.stat().st_mode & 0o777 == 0o700
    for secret in (home.token, home.store_keys, home.store_config, home.state):
        assert secret.stat().st_mode & 0o777 == 0o600, secret


def test_a_secret_that_others_can_read_is_refused(new_home: Home) -> None:
    furnish(new_home)
    new_home.token.chmod(0o644)
    with pytest.raises(HeliostatError, match=r"ray-token has mode 0644"):
        local.start(new_home, free_ports=True, with_ray=False)
    assert local.find(new_home) is None


def test_the_store_refuses_anonymous_and_wrong_credentials(s3: local.Cluster) -> None:
    keys = read_store_keys(s3.home)
    open_own_s3(s3).put_object(Bucket=local.BUCKET, Key="guarded", Body=b"x")
    for intruder in (
        open_s3(s3, config=Config(signature_version=UNSIGNED)),
        open_s3(s3, aws_access_key_id=keys.access_key, aws_secret_access_key="wrong"),
        open_s3(s3, aws_access_key_id="nobody", aws_secret_access_key=keys.secret_key),
    ):
        with pytest.raises(ClientError, match=r"403|AccessDenied|Invalid|Signature"):
            intruder.get_object(Bucket=local.BUCKET, Key="guarded")
    filer = f"http://127.0.0.1:{s3.state.ports.store_filer}/buckets/{local.BUCKET}/guarded"
    assert ask(filer) == 401


def test_the_store_listens_on_loopback_only(s3: local.Cluster) -> None:
    [server] = processes.find(s3.state.marker("store"))
    addresses = {
        connection.laddr.ip
        for connection in server.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}


def test_objects_survive_a_stop_and_a_crash_and_go_with_a_purge(new_home: Home) -> None:
    cluster = local.start(new_home, free_ports=True, with_ray=False)
    open_own_s3(cluster).put_object(Bucket=local.BUCKET, Key="kept", Body=b"kept")

    assert local.stop(new_home)
    assert list_processes(cluster) == []
    assert machine.is_free(cluster.state.ports.s3)
    assert not Path(f"/tmp/seaweedfs-s3-{cluster.state.ports.s3}.sock").exists()
    assert local.stop(new_home) == []

    told: list[str] = []
    crashed = local.start(new_home, free_ports=True, with_ray=False, report=told.append)
    assert not any("without `heliostat down`" in line for line in told)
    [server] = list_processes(crashed)
    server.kill()
    server.wait()
    assert local.find(new_home) is None

    again = local.start(new_home, free_ports=True, with_ray=False, report=told.append)
    assert any("without `heliostat down`" in line for line in told)
    assert not crashed.state.scratch.exists()
    body = open_own_s3(again).get_object(Bucket=local.BUCKET, Key="kept")["Body"]
    assert body.read() == b"kept"

    assert local.purge(new_home) > 0
    assert list_processes(again) == []
    assert not new_home.path.exists()
    assert not again.state.scratch.exists()


def test_two_homes_are_two_stores(s3: local.Cluster, new_home: Home) -> None:
    other = local.start(new_home, free_ports=True, with_ray=False)
    assert other.s3_url != s3.s3_url
    keys = read_store_keys(s3.home)
    stranger = open_s3(
        other, aws_access_key_id=keys.access_key, aws_secret_access_key=keys.secret_key
    )
    with pytest.raises(ClientError):
        stranger.list_buckets()
    local.stop(new_home)
    assert open_own_s3(s3).list_buckets()["Buckets"]


def test_starting_twice_changes_nothing(s3: local.Cluster) -> None:
    before = {process.pid for process in list_processes(s3)}
    assert local.start(s3.home, free_ports=True, with_ray=False) == s3
    assert {process.pid for process in list_processes(s3)} == before


@pytest.mark.parametrize("act", [local.purge, lambda home: local.start(home, with_ray=False)])
def test_a_directory_that_is_no_home_stays_as_it_is(
    tmp_path: Path, act: Callable[[Home], object]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(HeliostatError, match=MARKER_FILE):
        act(Home(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# The whole cluster.


@pytest.mark.cluster
@pytest.mark.parametrize("path", ["api/jobs/", "api/cluster_status", "nodes?view=summary"])
def test_the_dashboard_answers_only_with_the_token(cluster: local.Cluster, path: str) -> None:
    url = f"{cluster.dashboard_url}/{path}"
    assert ask(url) == 401
    assert ask(url, token="0" * 64) == 403
    assert ask(url, token=cluster.home.token.read_text()) == 200


@pytest.mark.cluster
def test_everything_listens_on_loopback_only(cluster: local.Cluster) -> None:
    ports, found = cluster.state.ports, list_open_ports(cluster)
    assert {(interface, port) for interface, port in found if interface != "127.0.0.1"} == set()
    expected = {ports.edge, ports.serve, ports.serve_stats, ports.serve_metrics}
    assert {port for _, port in found} >= expected


@pytest.mark.cluster
def test_others_on_the_machine_reach_neither_the_sessions_nor_the_admin_socket(
    cluster: local.Cluster,
) -> None:
    """Ray opens its own directory and HAProxy's socket to everybody; the one above stays shut."""
    assert stat.S_IMODE(cluster.state.scratch.stat().st_mode) == 0o700
    assert list(cluster.state.scratch.rglob("admin.sock"))


@pytest.mark.cluster
def test_serve_depends_on_no_package_of_a_job(cluster: local.Cluster) -> None:
    script = (
        "import ray, ray.util.state as state; ray.init();"
        "actors = state.list_actors(detail=True, filters=[('ray_namespace', '=', 'serve')]);"
        "print(sorted({actor.class_name for actor in actors}));"
        "print([actor.serialized_runtime_env for actor in actors])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **cluster.env},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "ServeController" in result.stdout
    assert "HAProxyManager" in result.stdout
    assert "gcs://" not in result.stdout


@pytest.mark.cluster
def test_a_lost_part_is_started_again_and_the_other_stays(
    cluster: local.Cluster, wait_until: WaitUntil
) -> None:
    ray = {process.pid for process in processes.find(cluster.state.marker("ray"))}
    [server] = processes.find(cluster.state.marker("store"))
    server.kill()
    wait_until(lambda: "store" not in local.measure_usage(cluster))
    assert local.start(cluster.home) == cluster
    assert set(local.measure_usage(cluster)) == {"edge", "ray", "store"}
    assert ray & {process.pid for process in processes.find(cluster.state.marker("ray"))}
    assert open_own_s3(cluster).list_buckets()["Buckets"]


@pytest.mark.cluster
def test_a_killed_edge_is_back_and_a_lost_one_is_started_again(
    cluster: local.Cluster, wait_until: WaitUntil
) -> None:
    marker = cluster.state.marker("edge")

    def find(name: str) -> list[psutil.Process]:
        return [process for process in processes.find(marker) if process.info["name"] == name]

    [first] = find("haproxy")
    first.kill()
    wait_until(lambda: [p for p in find("haproxy") if p.pid != first.pid], seconds=6)
    for process in [*find("sh"), *find("haproxy")]:
        process.kill()
    wait_until(lambda: "edge" not in local.measure_usage(cluster))
    assert local.start(cluster.home) == cluster
    assert ask(f"{cluster.edge_url}/-/routes") == 404


@pytest.mark.faults
def test_a_killed_node_is_found_dead_within_seconds(
    cluster: local.Cluster, join_node: Callable[[int], str], wait_until: WaitUntil, tmp_path: Path
) -> None:
    watch = (
        "import time, ray; ray.init()\n"
        "while True: print(sum(n['Alive'] for n in ray.nodes()), flush=True); time.sleep(0.2)\n"
    )
    log = tmp_path / "watch.log"
    marker = join_node(1)
    processes.launch(marker, [sys.executable, "-c", watch], {**os.environ, **cluster.env}, log)
    wait_until(lambda: "\n2\n" in log.read_text(), seconds=120)
    [raylet] = [found for found in processes.find(marker) if found.info["name"] == "raylet"]
    raylet.kill()
    wait_until(lambda: log.read_text().endswith("1\n"), seconds=10)


def test_serves_proxy_takes_clients_once_it_knows_replicas_and_a_stray_one_goes_then(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    """As Serve starts it: anew without `-sf`, and with it once there is something to know."""
    port = machine.pick_ports(1)[0]
    script, config = tmp_path / "start", tmp_path / "haproxy.cfg"
    script.write_text(head.render_start(find_haproxy()))
    pids = Path(f"{config}.pids")
    script.chmod(0o700)
    running: list[subprocess.Popen[bytes]] = []

    def start(*takes_over: str) -> "subprocess.Popen[bytes]":
        config.write_text(PROXY.format(port=port))
        command: list[str | Path] = [script, "-db", "-f", config, *takes_over]
        running.append(subprocess.Popen(command))
        return running[-1]

    def listens() -> bool:
        return not machine.is_free(port)

    def idles(process: "subprocess.Popen[bytes]") -> bool:
        """It runs and takes no clients."""
        sockets = psutil.Process(process.pid).net_connections("unix")
        return any("idle-" in str(socket.laddr) for socket in sockets)

    try:
        first = start()
        wait_until(lambda: idles(first))
        assert not listens()
        second = start("-sf", str(first.pid))
        wait_until(listens)
        assert first.wait(10) == 0
        third = start()  # the keeper of the second was killed
        wait_until(lambda: idles(third))
        assert second.poll() is None
        assert listens()
        fourth = start("-sf", str(third.pid))
        assert (second.wait(10), third.wait(10)) == (0, 0)
        assert fourth.poll() is None
        assert listens()
        fourth.kill()
        fourth.wait()
        wait_until(listens)
        stand_in = psutil.Process(int(pids.read_text()))
        assert stand_in.pid != fourth.pid
        fifth = start()
        wait_until(lambda: idles(fifth))
        assert listens()
        sixth = start("-sf", str(fifth.pid))
        assert fifth.wait(10) == 0
        wait_until(lambda: not is_alive(stand_in))
        assert sixth.poll() is None
        assert listens()
    finally:
        pids.unlink(missing_ok=True)  # for whom there is none nobody stands in
        for process in running:
            process.kill()
            process.wait()


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


PROXY = """defaults
    mode http
    timeout client 1s
    timeout server 1s
    timeout connect 1s
frontend http_frontend
    bind 127.0.0.1:{port}
    http-request return status 200
"""
