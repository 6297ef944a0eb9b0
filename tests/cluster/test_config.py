"""Laws of cluster.yaml: Ray and AWS take it, nothing in it listens to the world or holds a key."""

import json
import os
import stat
import subprocess
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from heliostat import cli
from heliostat.cluster.config import Config, check, exports, start_commands
from heliostat.errors import HeliostatError
from heliostat.local.home import locate

PATH = Path(__file__).parents[2] / "cluster.yaml"
OPEN = {"FromPort": 8265, "ToPort": 8265, "IpProtocol": "tcp"}
STUB = """#!/bin/sh
{ echo "$(basename "$0") $*"; echo "umask $(umask)"; env; echo =====; } >> "$HOME/calls"
"""


def document() -> Config:
    return dict(yaml.safe_load(PATH.read_text()))


@pytest.fixture(scope="module")
def config() -> Config:
    return check(PATH)


@pytest.fixture
def check_changed(tmp_path: Path) -> Callable[[Callable[[Config], object]], Config]:
    """Check cluster.yaml after a change to it."""

    def check_changed(change: Callable[[Config], object]) -> Config:
        changed = document()
        change(changed)
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump(changed))
        return check(path)

    return check_changed


def edit(config: Config, old: str, new: str) -> None:
    """Replace `old` in every command; it must occur."""
    count = 0
    for key in (key for key in config if key.endswith("_commands")):
        count += sum(old in command for command in config[key])
        config[key] = [command.replace(old, new) for command in config[key]]
    assert count


def open_port(config: Config, **ranges: Any) -> None:
    config["provider"]["security_group"]["IpPermissions"] = [OPEN | ranges]


def volume_of(config: Config, node: str) -> dict[str, Any]:
    """The root volume of `node` alone: in the file it may be written once for several."""
    node_config = config["available_node_types"][node]["node_config"]
    (mapping,) = node_config["BlockDeviceMappings"] = deepcopy(node_config["BlockDeviceMappings"])
    volume: dict[str, Any] = mapping["Ebs"]
    return volume


def give_up_training(config: Config) -> None:
    config["available_node_types"].pop("training")
    edit(config, "training=4x4:1 ", "")


SETTINGS = "every ray start carries the settings"
TOKEN = "the token arrives as a file of mode 0600"
LOOPBACK = "everything but an edge with TLS listens on 127.0.0.1"
CLOSED = "only ssh and an edge with TLS are open to the outside"
PROFILE = "nodes get credentials from their cloud alone"
VOLUMES = "volumes are encrypted"
POOLED = "each pool of HELIOSTAT_POOLS has nodes"
BROKEN: dict[str, tuple[Callable[[Config], object], str]] = {
    "no authentication": (lambda c: edit(c, "RAY_AUTH_MODE=token", ""), SETTINGS),
    "other authentication": (lambda c: edit(c, "MODE=token", "MODE=disabled"), SETTINGS),
    "not exported": (lambda c: edit(c, "export RAY_AUTH_MODE", "RAY_AUTH_MODE"), SETTINGS),
    "exported too late": (lambda c: edit(c, "export", "ray start --head; export"), SETTINGS),
    "worker forgot": (lambda c: c["worker_start_ray_commands"].append("ray start"), SETTINGS),
    "Ray's own start": (lambda c: c.pop("head_start_ray_commands"), "head_start_ray_commands"),
    "no HAProxy": (lambda c: edit(c, "ENABLE_HA_PROXY=1", "ENABLE_HA_PROXY=0"), SETTINGS),
    "no token mount": (lambda c: c["file_mounts"].pop("~/.heliostat/token"), TOKEN),
    "no token path": (lambda c: edit(c, "RAY_AUTH_TOKEN_PATH", "TOKEN_PATH"), TOKEN),
    "readable token": (lambda c: edit(c, "chmod 600", "chmod 644"), TOKEN),
    "own setup": (
        lambda c: c["available_node_types"]["training"].update(worker_setup_commands=["true"]),
        TOKEN,
    ),
    "public dashboard": (
        lambda c: edit(c, "dashboard-host=127.0.0.1", "dashboard-host=0.0.0.0"),
        LOOPBACK,
    ),
    "public Serve": (lambda c: edit(c, "http-host 127.0.0.1", "http-host ::"), LOOPBACK),
    "public edge without TLS": (lambda c: edit(c, "--port 8080", "--bind 0.0.0.0"), LOOPBACK),
    "port of an edge without TLS": (
        lambda c: open_port(c, FromPort=8080, ToPort=8080, IpRanges=[{"CidrIp": "0.0.0.0/0"}]),
        CLOSED,
    ),
    "public program": (lambda c: c["setup_commands"].append("nc -l 0.0.0.0 80"), LOOPBACK),
    "port for the world": (lambda c: open_port(c, IpRanges=[{"CidrIp": "0.0.0.0/0"}]), CLOSED),
    "port for IPv6": (lambda c: open_port(c, Ipv6Ranges=[{"CidrIpv6": "::/0"}]), CLOSED),
    "port for half the world": (lambda c: open_port(c, IpRanges=[{"CidrIp": "0.0.0.0/1"}]), CLOSED),
    "ports around ssh": (
        lambda c: open_port(c, FromPort=21, ToPort=23, IpRanges=[{"CidrIp": "0.0.0.0/0"}]),
        CLOSED,
    ),
    "no profile": (
        lambda c: c["available_node_types"]["data"]["node_config"].pop("IamInstanceProfile"),
        PROFILE,
    ),
    "key in a command": (lambda c: edit(c, "export", "export AWS_SECRET_ACCESS_KEY=x"), PROFILE),
    "token in a command": (lambda c: edit(c, "export", "export RAY_AUTH_TOKEN=x"), PROFILE),
    "keys by mount": (lambda c: c["file_mounts"].update({"~/.aws": "~/.aws"}), PROFILE),
    "public Prometheus": (lambda c: edit(c, "127.0.0.1:9090", ":9090"), LOOPBACK),
    "Prometheus as it comes": (
        lambda c: edit(c, "--web.listen-address=127.0.0.1:9090", ""),
        LOOPBACK,
    ),
    "open volume": (lambda c: volume_of(c, "training").update(Encrypted=False), VOLUMES),
    "volume of the image": (
        lambda c: c["available_node_types"]["data"]["node_config"].pop("BlockDeviceMappings"),
        VOLUMES,
    ),
    "no pool": (lambda c: c["available_node_types"].pop("serving"), POOLED),
    "no label": (lambda c: c["available_node_types"]["data"].pop("labels"), POOLED),
    "no resource": (
        lambda c: c["available_node_types"]["data"]["resources"].pop("data"),
        POOLED,
    ),
    "unknown key": (lambda c: c.update(worker_nodes_max=3), "Ray refuses the top level"),
    "wrong type": (lambda c: c.update(max_workers="many"), "Ray refuses max_workers"),
    "no provider": (lambda c: c.pop("provider"), "Ray cannot use it"),
    "unknown provider": (lambda c: c["provider"].update(type="moon"), "Ray cannot use it"),
    "no such head": (lambda c: c.update(head_node_type="x"), "Ray cannot use it"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_named(check_changed: Callable[..., Config], name: str) -> None:
    change, rule = BROKEN[name]
    with pytest.raises(HeliostatError, match=rule) as caught:
        check_changed(change)
    assert len(str(caught.value)) < 600


def open_edge(config: Config) -> None:
    """As the comment in cluster.yaml says."""
    edit(config, "edge --port 8080", "edge --bind 0.0.0.0 --port 8443 --tls-cert ~/edge.pem")
    open_port(config, FromPort=8443, ToPort=8443, IpRanges=[{"CidrIp": "0.0.0.0/0"}])


@pytest.mark.parametrize(
    "change",
    [
        open_edge,
        lambda c: open_port(c, FromPort=22, ToPort=22, IpRanges=[{"CidrIp": "203.0.113.7/32"}]),
        lambda c: open_port(c, IpRanges=[{"CidrIp": "10.0.0.0/8"}]),
        give_up_training,
        lambda c: c["setup_commands"].append("echo '-- ray started --'"),
    ],
)
def test_what_keeps_the_rules_may_be_changed(
    check_changed: Callable[..., Config], change: Callable[[Config], object]
) -> None:
    check_changed(change)


@pytest.mark.parametrize("text", ["", "[]", "a: [", "\0", "provider: 3", "provider: {type: 3}"])
def test_what_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(HeliostatError, match=r"cluster\.yaml"):
        check(path)
    with pytest.raises(HeliostatError, match="cannot read"):
        check(tmp_path / "missing.yaml")


def commands(config: Config) -> list[str]:
    return [
        command for key, value in config.items() if key.endswith("_commands") for command in value
    ]


def test_every_command_is_shell(config: Config) -> None:
    for command in commands(config):
        subprocess.run(["bash", "-n", "-c", command], check=True)


@pytest.fixture
def node(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command as Ray's launcher does, in a home and with programs of the test's own."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("ray", "serve", "cloud-init", "heliostat"):
        (programs / name).write_text("#!/bin/sh\necho us-west-2" if name == "cloud-init" else STUB)
        (programs / name).chmod(0o755)

    def run(command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        path = f"{programs}:{os.environ['PATH']}"
        environment = {"HOME": str(tmp_path), "PATH": path, "OMP_NUM_THREADS": "1", **variables}
        return subprocess.run(
            ["bash", "-c", command], env=environment, check=True, capture_output=True, text=True
        )

    return run


def test_ray_starts_with_all_settings_and_private_files(
    config: Config, tmp_path: Path, node: Callable[..., Any]
) -> None:
    for command in start_commands(config):
        node(command, RAY_HEAD_IP="10.0.0.1")
    calls = (tmp_path / "calls").read_text().split("=====\n")[:-1]
    for call in calls:
        lines = set(call.splitlines())
        assert {"umask 0077", "RAY_AUTH_MODE=token", "AWS_REGION=us-west-2"} <= lines
        assert f"RAY_AUTH_TOKEN_PATH={tmp_path}/.heliostat/token" in lines
        assert "OMP_NUM_THREADS" not in call
    head, serve, worker = calls
    assert "ray start --head --port=6379" in head
    assert "serve start --http-host 127.0.0.1 --http-port 8000" in serve
    assert "ray start --address=10.0.0.1:6379" in worker


def test_the_head_has_an_edge_before_serve_where_jobs_say_it_is(
    config: Config, tmp_path: Path, node: Callable[..., Any], wait_until: Callable[..., None]
) -> None:
    (command,) = (c for c in config["head_start_ray_commands"] if "heliostat edge" in c)
    node(command)
    calls = tmp_path / "calls"
    wait_until(lambda: calls.exists() and "=====" in calls.read_text())
    (call,) = (line for line in calls.read_text().splitlines() if line.startswith("heliostat "))
    options = cli._build_parser().parse_args(call.split()[1:])
    head, _ = start_commands(config)
    assert f"--http-port {options.upstream_port}" in head
    assert exports(head)["HELIOSTAT_EDGE_URL"] == f"http://127.0.0.1:{options.port}"
    assert options.bind is None


def test_head_and_workers_export_the_same(config: Config) -> None:
    head, worker = map(exports, start_commands(config))
    assert head == worker


def test_the_token_is_private_on_arrival(
    config: Config, tmp_path: Path, node: Callable[..., Any]
) -> None:
    token = tmp_path / ".heliostat" / "token"
    token.parent.mkdir(mode=0o775)
    token.write_text("secret")
    token.chmod(0o664)
    node(config["setup_commands"][0])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700


def test_a_shell_on_a_node_finds_the_cluster(
    config: Config, tmp_path: Path, node: Callable[..., Any]
) -> None:
    (line,) = (command for command in config["setup_commands"] if "bashrc" in command)
    node(line)
    node(line)
    assert len((tmp_path / ".bashrc").read_text().splitlines()) == 1
    shown = node(". ~/.bashrc; echo $RAY_AUTH_MODE $RAY_AUTH_TOKEN_PATH; echo $PATH").stdout
    assert shown.startswith(f"token {tmp_path}/.heliostat/token\n{tmp_path}/heliostat-venv/bin:")


def test_every_mounted_file_is_in_the_repository(config: Config) -> None:
    for remote, local in config["file_mounts"].items():
        assert remote.startswith("~/")
        assert local.startswith(("~/", "dist/")) or (PATH.parent / local).exists()


def test_no_secret_stands_in_the_config(config: Config) -> None:
    assert "BEGIN" not in json.dumps(config)
    assert config["file_mounts"]["~/.heliostat/token"] == "~/.config/heliostat/token"


def test_no_file_of_the_user_lies_in_the_home_of_the_laptop_cluster(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`heliostat up` refuses a folder that holds anything else, `down --purge` removes it."""
    monkeypatch.delenv("HELIOSTAT_HOME", raising=False)
    for mounted in config["file_mounts"].values():
        assert not Path(mounted).expanduser().is_relative_to(locate().path)
