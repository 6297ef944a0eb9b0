"""The commands: what each prints and returns, and what `up` and `down` start and leave."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import save

from drafting import draft
from heliostat import cli, local, registry, storage, usage
from heliostat.local import machine, processes
from heliostat.local.home import Home, furnish, read_state

COMMANDS = (
    *(["up"], ["edge"], ["status"], ["env"], ["down"], ["upload"]),
    *(["models"], ["models", "show"], ["models", "alias"], ["export"]),
    *(["cluster", "render"], ["cluster", "check"]),
    *(["submit"], ["jobs"], ["logs"], ["stop"], ["why"]),
    *(["check"], ["plan"], ["deploy"], ["rollback"], ["deployments"]),
    *(["keys"], ["keys", "create"], ["keys", "list"], ["keys", "revoke"], ["usage"]),
    *(["watch-spot"], ["drain"]),
)


@pytest.fixture(autouse=True)
def own_end() -> Iterator[None]:
    """`main` takes SIGTERM for itself; the session's fixtures need it back."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def new_home() -> Iterator[Home]:
    """A home with a name that a shell must quote; whatever a test starts in it is stopped."""
    with tempfile.TemporaryDirectory(prefix="heliostat-test-") as directory:
        home = Home(Path(directory) / "it's $HOME")
        yield home
        local.stop(home)


def run(
    *arguments: object, environment: Mapping[str, str] = os.environ
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "heliostat.cli", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def publish(root: Path) -> None:
    store = storage.connect(str(root))
    made = draft("digits", run="first", step=7, metrics={"accuracy": 0.97})
    registry.publish(store, made, save({"w": np.zeros(2, np.float32)}))
    registry.set_alias(store, "digits", "production", 1)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_gives_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command, "--help"])
    assert f"examples:\n  heliostat {' '.join(command)}" in capsys.readouterr().out.replace(
        'eval "$(heliostat env)"', "heliostat env"
    )


def test_help_imports_neither_ray_nor_torch_nor_boto3() -> None:
    script = (
        "import sys; from heliostat import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: print({'ray', 'torch', 'boto3', 'pydantic'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.endswith("set()\n")


def test_where_nothing_runs_each_command_says_so(new_home: Home) -> None:
    assert run("status", "--home", new_home.path).returncode == 1
    assert json.loads(run("status", "--json", "--home", new_home.path).stdout)["parts"] == {}
    result = run("env", "--home", new_home.path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "start it with `heliostat up`" in result.stderr
    bare = {name: text for name, text in os.environ.items() if not name.startswith("AWS_")}
    result = run("models", "--home", new_home.path, environment=bare)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "start it with `heliostat up`, or name your bucket" in result.stderr
    assert run("down", "--home", new_home.path).stdout == "Nothing ran.\n"
    result = run("down", "--purge", "--home", new_home.path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert not new_home.path.exists()


def test_a_taken_port_is_one_sentence_and_nothing_is_left(new_home: Home) -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if machine.is_free(8333):  # else another program has taken it, which is as good
            server.bind(("127.0.0.1", 8333))
            server.listen()
        result = run("up", "--home", new_home.path)
    assert result.returncode == 2
    assert "8333 (S3)" in result.stderr
    assert "--free-ports" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not new_home.state.exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--bind", "example.org"], "is no IP address"),
        (["--bind", "127.0.0.1:80"], "is no IP address"),
        (["--tls-cert", "/nothing.pem"], "cannot be read"),
    ],
)
def test_an_edge_that_cannot_listen_so_is_refused_first(
    new_home: Home, options: list[str], sentence: str
) -> None:
    result = run("up", "--home", new_home.path, *options)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert sentence in result.stderr
    assert not new_home.path.exists()


def test_the_edge_alone_runs_and_a_second_one_takes_over(
    tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    port, config = machine.pick_ports(1)[0], tmp_path / "edge.cfg"
    command = [sys.executable, "-m", "heliostat.cli", "edge", f"--port={port}"]
    command += ["--upstream-port=9", f"--config={config}"]

    def find() -> list[int]:
        found = processes.find(f"{config}.edge")
        return [process.pid for process in found if process.info["name"] == "haproxy"]

    edges = []
    try:
        edges.append(subprocess.Popen(command))
        wait_until(lambda: find() and not machine.is_free(port))
        (first,) = find()
        edges.append(subprocess.Popen(command))
        wait_until(lambda: find() not in ([], [first]) and not machine.is_free(port))
        wait_until(lambda: len(find()) == 1)
        assert find() != [first]
        assert edges[0].wait(10) is not None
    finally:
        processes.end(f"{config}.edge", grace_seconds=0)
        for edge in edges:
            edge.wait()


def test_an_edge_on_a_taken_port_is_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run("edge", f"--port={port}", f"--config={tmp_path / 'edge.cfg'}")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert f"port {port}" in result.stderr


def test_env_is_fit_for_eval_whatever_the_home_is_called(new_home: Home) -> None:
    cluster = local.start(new_home, free_ports=True, with_ray=False)
    script = f'eval "$({sys.executable} -m heliostat.cli env)" && env -0'
    shell = {
        "PATH": os.environ["PATH"],
        "HELIOSTAT_HOME": str(new_home.path),
        "AWS_PROFILE": "elsewhere",
    }
    output = subprocess.run(
        ["bash", "-c", script], env=shell, capture_output=True, text=True, check=True
    ).stdout
    variables = dict(line.split("=", 1) for line in output.split("\0") if line)
    assert variables.items() >= cluster.env.items()
    assert variables["RAY_AUTH_TOKEN_PATH"] == str(new_home.token)
    assert "AWS_PROFILE" not in variables


def test_models_finds_the_running_store_by_itself(s3: local.Cluster) -> None:
    bare = {"PATH": os.environ["PATH"], "HELIOSTAT_HOME": str(s3.home.path)}
    result = subprocess.run(
        [sys.executable, "-m", "heliostat.cli", "models", "--root", f"{s3.root}/empty"],
        env=bare,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == f"No model has been published to {s3.root}/empty yet.\n"


def test_models_lists_versions_and_walks_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(tmp_path)
    root = ["--root", str(tmp_path)]

    assert cli.main(["models", *root]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[::3] == ["digits:1", "production"]

    assert cli.main(["models", *root, "--json"]) == 0
    models = json.loads(capsys.readouterr().out)
    assert models["digits"]["aliases"] == {"production": 1}
    assert models["digits"]["versions"][0]["step"] == 7

    assert cli.main(["models", *root, "show", "digits@production"]) == 0
    shown = capsys.readouterr().out
    assert "digits:1" in shown
    assert "missing" in shown
    assert "data/digits/0000000000000000/manifest.json" in shown

    assert cli.main(["models", "show", "digits:1", *root, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"]["run"] == "first"

    assert cli.main(["models", "show", "digits:2", *root]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_an_alias_moves_and_a_missing_version_does_not_take_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(tmp_path)
    root = ["--root", str(tmp_path)]
    assert cli.main(["models", *root, "alias", "digits", "canary"]) == 0
    assert capsys.readouterr().out == "digits@canary is digits:1\n"
    assert cli.main(["models", *root, "alias", "digits:2", "canary"]) == 2
    assert registry.resolve(storage.connect(str(tmp_path)), "digits@canary").number == 1


def test_an_upload_keeps_paths_and_leaves_hidden_files(
    tmp_path: Path, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("zero/a b.png", "one/é.png", ".git/config", "one/.DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    assert cli.main(["upload", str(tmp_path), f"{bucket}/raw"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{bucket}/raw"
    store = storage.connect(f"{bucket}/raw")
    assert [entry.key for entry in store.list()] == ["one/é.png", "zero/a b.png"]
    assert store.read("one/é.png") == "one/é.png".encode()
    assert cli.main(["upload", str(tmp_path / "none"), f"{bucket}/raw"]) == 2


def test_a_key_is_made_shown_once_listed_and_revoked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--root", str(tmp_path)]
    assert cli.main(["keys", *root]) == 0
    assert "no key" in capsys.readouterr().out
    scopes = ["--models", "digits,letters", "--verbs", "predict,read", "--days", "90"]
    limits = ["--limit", "requests_per_second=2.5", "--limit", "rows_per_month=7"]
    assert cli.main(["keys", "create", "--owner", "ana", *scopes, *limits, *root]) == 0
    made = capsys.readouterr()
    token = made.out.strip()
    _, key_id, secret = token.split("_")
    assert secret not in made.err

    assert cli.main(["keys", "list", *root]) == 0
    listed = capsys.readouterr().out
    assert "digits,letters" in listed
    assert "requests_per_second=2.5 rows_per_month=7" in listed
    assert cli.main(["keys", *root, "list", "--json"]) == 0
    shown = capsys.readouterr().out
    (key,) = json.loads(shown)
    assert (key["id"], key["owner"], key["verbs"]) == (key_id, "ana", ["predict", "read"])
    assert secret not in listed + shown

    for _ in range(2):
        assert cli.main(["keys", "revoke", key_id, *root]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert "was revoked at" in first


@pytest.mark.parametrize(
    "arguments",
    [
        ["create", "--owner", "ana", "--limit", "requests_per_second=0"],
        ["create", "--owner", "ana", "--limit", "requests"],
        ["create", "--owner", "ana", "--limit", "wishes=3"],
        ["create", "--owner", "ana", "--models", "../x"],
        ["create", "--owner", "ana", "--verbs", "delete"],
        ["create", "--owner", "ana", "--days", "nan"],
        ["create", "--owner", "a\nb"],
        ["revoke", "0123456789abcdef"],
        ["revoke", "me"],
    ],
    ids=" ".join,
)
def test_a_key_that_cannot_be_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert cli.main(["keys", *arguments, "--root", str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert output.err.startswith("error: ")


def test_usage_adds_up_by_what_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(tmp_path)]
    assert cli.main(["usage", *root]) == 0
    assert "No request" in capsys.readouterr().out
    meter = usage.Meter(storage.connect(str(tmp_path)), wall=lambda: 1e9)
    meter.add(
        usage.Record(1e9 + day * 86_400, "k", model, 1, "/", 3, 0, 0, 0.5, status)
        for day, model, status in ((0, "a", 200), (0, "b", 422), (1, "a", 200))
    )
    meter.flush()
    assert cli.main(["usage", *root, "--by", "model", "--json"]) == 0
    sums = json.loads(capsys.readouterr().out)
    assert {name: one["requests"] for name, one in sums.items()} == {"a": 2, "b": 1}
    assert cli.main(["usage", *root, "--by", "day", "--since", "2001-09-10"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["day", "requests", "errors"]
    assert [row.split()[:4] for row in rows] == [["2001-09-10", "1", "0", "3"]]
    with pytest.raises(SystemExit, match="2"):
        cli.main(["usage", *root, "--since", "yesterday"])
    capsys.readouterr()
    assert cli.main(["usage", *root, "--prune-before", "2001-09-10"]) == 0
    assert capsys.readouterr().out.startswith("1 objects with records of days before 2001-09-10")
    assert list(usage.summarise(storage.connect(str(tmp_path)), "day")) == ["2001-09-10"]


@pytest.mark.cluster
def test_up_twice_is_harmless(cluster: local.Cluster) -> None:
    before = main_programs(cluster)
    result = run("up", "--home", cluster.home.path)
    assert result.returncode == 0
    assert "Everything runs already." in result.stdout
    assert cluster.edge_url in result.stdout
    assert before == main_programs(cluster)


@pytest.mark.cluster
def test_an_up_that_asks_for_another_address_is_refused(cluster: local.Cluster) -> None:
    result = run("up", "--home", cluster.home.path, "--bind", "0.0.0.0")
    assert result.returncode == 2
    warning, error = result.stderr.splitlines()
    assert "without TLS" in warning
    assert "`heliostat down` first" in error


@pytest.mark.cluster
@pytest.mark.faults
def test_a_second_cluster_lives_beside_the_first_and_goes_alone(
    cluster: local.Cluster, new_home: Home
) -> None:
    strays = set(Path("/tmp").glob("pymp-*"))
    result = run("up", "--free-ports", "--home", new_home.path)
    assert result.returncode == 0, result.stderr
    second = local.find(new_home)
    assert second is not None
    status = json.loads(run("status", "--json", "--home", new_home.path).stdout)
    assert set(status["parts"]) == {"edge", "ray", "store"}
    assert status["edge_url"] == f"http://127.0.0.1:{second.state.ports.edge}"
    assert status["bounds"]["logical_cpus"] >= 4

    # The shell of `heliostat env`: a job sees the bucket, `ray.init` and `serve` find the cluster.
    script = f"""
        set -e
        eval "$({sys.executable} -m heliostat.cli env)"
        cd /tmp
        ray job submit -- python -c 'import boto3; print(boto3.client("s3").list_buckets())'
        python -c 'import ray; ray.init(); print("CPUs", ray.cluster_resources()["CPU"])'
        serve status
    """
    shell = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HELIOSTAT_HOME": str(new_home.path),
    }
    result = subprocess.run(
        ["bash", "-c", script], env=shell, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "'Name': 'heliostat'" in result.stdout
    assert f"CPUs {status['bounds']['logical_cpus']}" in result.stdout
    assert "HEALTHY" in result.stdout

    # The orphans of a dead raylet (HAProxy, agents) go as well.
    ours = [psutil.Process(pid) for pid in local.measure_usage(second)["ray"].pids]
    next(process for process in ours if process.name() == "raylet").kill()
    result = run("down", "--home", new_home.path)
    assert "The data stays in" in result.stdout
    assert [process for process in ours if is_alive(process)] == []
    assert_nothing_is_left(second)
    assert set(Path("/tmp").glob("pymp-*")) == strays
    assert set(local.measure_usage(cluster)) == {"edge", "ray", "store"}


@pytest.mark.cluster
@pytest.mark.faults
def test_a_half_failed_up_stops_what_it_started_and_says_why(new_home: Home) -> None:
    furnish(new_home)
    new_home.token.write_text("")
    result = run("up", "--free-ports", "--home", new_home.path)
    assert result.returncode == 2
    assert "Ray did not start: " in result.stderr
    assert str(new_home.ray_log) in result.stderr
    assert result.stderr.count("\n") == 1
    assert local.find(new_home) is None
    assert not new_home.state.exists()


@pytest.mark.cluster
@pytest.mark.faults
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_up_leaves_nothing_running(
    new_home: Home, wait_until: Callable[..., None], signum: int, status: int
) -> None:
    command = [sys.executable, "-m", "heliostat.cli", "up", "--free-ports", "--home"]
    up = subprocess.Popen([*command, str(new_home.path)], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: read_state(new_home) is not None)
    state = read_state(new_home)
    assert state is not None
    started = local.Cluster(new_home, state)
    wait_until(lambda: "gcs_server" in names_of(started), seconds=60)
    up.send_signal(signum)
    _, errors = up.communicate(timeout=60)
    assert up.returncode == status
    assert "Traceback" not in errors
    assert_nothing_is_left(started)


def main_programs(cluster: local.Cluster) -> set[tuple[str, int]]:
    """Name and id of what a part cannot run without; Ray's idle workers come and go."""
    return {
        (process.info["name"], process.pid)
        for part in local.PARTS
        for process in processes.find(cluster.state.marker(part.name))
        if process.info["name"] in part.programs
    }


def names_of(cluster: local.Cluster) -> set[str]:
    return {
        process.info["name"]
        for part in local.PARTS
        for process in processes.find(cluster.state.marker(part.name))
    }


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def assert_nothing_is_left(cluster: local.Cluster) -> None:
    ports = cluster.state.ports
    assert names_of(cluster) == set()
    assert [port for port in vars(ports).values() if not machine.is_free(port)] == []
    assert not cluster.state.scratch.exists()
    assert not cluster.home.state.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["candidate.min_requests=no", "--canary=10%"],
        ["--canary", "10%", "candidate.by=key", "candidate.min_requests=no"],
        ["replicas=2", "--shadow", "10%", "candidate.min_requests=no"],
    ],
)
def test_settings_stand_before_or_behind_the_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    publish(tmp_path)
    assert cli.main(["deploy", "--root", str(tmp_path), "digits:1", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: the command line: candidate.min_requests: ")
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["deploy", "digits:1", "--canari=10%"], ["rollback", "digits", "replicas=2"]]
)
def test_what_no_command_takes_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert f"unrecognized arguments: {arguments[-1]}" in capsys.readouterr().err


@pytest.mark.parametrize("share", ["abc", "0", "150%", "-1", "nan", ""])
def test_a_share_that_is_none_is_refused_in_a_sentence(
    share: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["deploy", "digits:1", f"--canary={share}"])
    assert f"{share!r} is no share: give one above 0%, up to 100%" in capsys.readouterr().err
