"""`heliostat up`, `edge`, `status`, `env`, `down`: the cluster of this machine."""

import argparse
import ipaddress
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from heliostat.cli.options import Commands, add_command, add_json, load_cluster
from heliostat.cli.output import GIB, MIB, print_now
from heliostat.errors import HeliostatError

if TYPE_CHECKING:
    from heliostat.local import Cluster, Listen, Usage
    from heliostat.pools import ClusterSpec

OTHER_CREDENTIALS = ("AWS_PROFILE", "AWS_SESSION_TOKEN")
SHOWN_PIDS = 8


def add_commands(commands: Commands) -> None:
    _add_up(commands)
    _add_edge(commands)
    command = add_command(
        commands,
        "status",
        show_status,
        "say what runs, where, and what it takes (exit status 1: nothing runs)",
        ["heliostat status", "heliostat status --json | jq -r .edge_url"],
    )
    add_json(command)
    add_command(
        commands,
        "env",
        print_env,
        "print the variables that point a shell at the cluster",
        ['eval "$(heliostat env)"'],
    )
    command = add_command(
        commands,
        "down",
        down,
        "stop exactly what `heliostat up` started; the data stays",
        ["heliostat down", "heliostat down --purge"],
    )
    command.add_argument("--purge", action="store_true", help="remove the data as well")


def up(options: argparse.Namespace) -> None:
    from heliostat import local

    home = local.locate(options.home)
    listen, pools = _read_listen(options), _read_pools(options)
    cluster = local.start(
        home, free_ports=options.free_ports, listen=listen, pools=pools, report=print_now
    )
    print(f"\n{_render_status(cluster)}")


def run_edge(options: argparse.Namespace) -> None:
    from pathlib import Path

    from heliostat.edge import Edge
    from heliostat.local import Listen, edge

    listen = _read_listen(options) or Listen()
    wanted = Edge(
        options.port,
        options.upstream_port,
        listen.host,
        listen.certificate,
        spare_port=options.spare_port,
    )
    edge.replace(wanted, Path(options.config).expanduser().absolute())


def show_status(options: argparse.Namespace) -> int:
    from heliostat import local

    home = local.locate(options.home)
    cluster = local.find(home)
    if options.json:
        print(json.dumps(_describe(cluster) if cluster else {"home": str(home.path), "parts": {}}))
    elif cluster:
        print(_render_status(cluster))
    else:
        print(f"Nothing runs in {home.path}: start it with `heliostat up`.")
    return 0 if cluster else 1


def print_env(options: argparse.Namespace) -> None:
    from heliostat import local

    home = local.locate(options.home)
    cluster = local.find(home)
    if cluster is None:
        raise HeliostatError(f"nothing runs in {home.path}: start it with `heliostat up`")
    for name in OTHER_CREDENTIALS:
        print(f"unset {name}")
    for name, value in cluster.env.items():
        print(f"export {name}={shlex.quote(value)}")


def down(options: argparse.Namespace) -> None:
    from heliostat import local

    home = local.locate(options.home)
    began = time.monotonic()
    ended = local.stop(home)
    seconds = time.monotonic() - began
    print(f"Stopped {len(ended)} processes in {seconds:.1f} s." if ended else "Nothing ran.")
    if options.purge:
        size_bytes = local.purge(home)
        print(f"Removed {home.path}: objects, logs and secrets, {size_bytes / MIB:.1f} MiB.")
    elif home.exists:
        print(f"The data stays in {home.objects} (`heliostat down --purge` removes it).")


def _add_up(commands: Commands) -> None:
    command = add_command(
        commands,
        "up",
        up,
        "start an S3 store, a Ray head with Serve, and the edge on this machine",
        [
            "heliostat up",
            "heliostat up --free-ports --home /tmp/second",
            "heliostat up --bind 0.0.0.0 --tls-cert edge.pem",
            "heliostat up --autoscale idle_timeout_minutes=0.5 training.max_workers=2",
        ],
    )
    command.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="with --autoscale: changes of the cluster's description",
    )
    command.add_argument(
        "--autoscale",
        action="store_true",
        help="bring nodes when something asks for them: processes here that stand for machines",
    )
    command.add_argument(
        "--cluster", metavar="FILE", help="with --autoscale: the description of the cluster"
    )
    command.add_argument("--free-ports", action="store_true", help="choose ports that are free")
    _add_listen(command)


def _add_edge(commands: Commands) -> None:
    command = add_command(
        commands,
        "edge",
        run_edge,
        "run the edge alone, before a Ray Serve that this machine has already",
        ["heliostat edge --bind 0.0.0.0 --port 8443 --tls-cert edge.pem"],
    )
    _add_listen(command)
    command.add_argument("--port", type=_parse_port, default=8080, help="listens there (8080)")
    command.add_argument(
        "--upstream-port", type=_parse_port, default=8000, help="where Serve listens (8000)"
    )
    command.add_argument(
        "--spare-port", type=_parse_port, help="where Serve's other proxy does, for when it is away"
    )
    command.add_argument(
        "--config", default="~/.heliostat-edge.cfg", metavar="FILE", help="is written there"
    )


def _add_listen(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--bind", metavar="ADDRESS", help="address of the edge (127.0.0.1; 0.0.0.0: all of them)"
    )
    command.add_argument(
        "--tls-cert", metavar="FILE", help="PEM with certificate, chain and key: HTTPS"
    )


def _read_listen(options: argparse.Namespace) -> "Listen | None":
    """Where the edge is asked to listen, if anything is asked for; warns of what is open.

    Raises:
        HeliostatError: that is no address, or the certificate cannot be read.
    """
    from pathlib import Path

    from heliostat.local import Listen

    if options.bind is None and options.tls_cert is None:
        return None
    path = options.tls_cert and str(Path(options.tls_cert).expanduser().absolute())
    listen = Listen(_parse_address(options.bind or Listen().host), path)
    if path and not os.access(path, os.R_OK):
        raise HeliostatError(
            f"--tls-cert {options.tls_cert} cannot be read: it needs a PEM file with the "
            f"certificate, its chain and its key"
        )
    if not path and not ipaddress.ip_address(listen.host).is_loopback:
        print(
            f"warning: others reach {listen.host} without TLS, so keys and answers can be read "
            f"on the way: give --tls-cert FILE",
            file=sys.stderr,
        )
    return listen


def _read_pools(options: argparse.Namespace) -> "ClusterSpec | None":
    if options.autoscale:
        return load_cluster(options.cluster, tuple(options.settings))
    if options.settings or options.cluster:
        raise HeliostatError("a description of a cluster is for --autoscale: add that")
    return None


def _parse_address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise HeliostatError(
            f"--bind {text} is no IP address: give one of this machine, or 0.0.0.0 for all"
        ) from error


def _parse_port(text: str) -> int:
    """Raises ArgumentTypeError: what is no port."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:6]) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port: give a number from 1 to 65535")
    return int(text)


def _describe(cluster: "Cluster") -> dict[str, Any]:
    from heliostat import local

    usage = local.measure_usage(cluster)
    return {
        "home": str(cluster.home.path),
        "root": cluster.root,
        "s3_url": cluster.s3_url,
        "dashboard_url": cluster.dashboard_url,
        "edge_url": cluster.edge_url,
        "serve_url": cluster.serve_url,
        "gcs_address": cluster.gcs_address,
        "bounds": asdict(cluster.state.bounds),
        "nodes": [asdict(node) for node in local.list_nodes(cluster)],
        "parts": {name: asdict(part) for name, part in usage.items()},
    }


def _render_status(cluster: "Cluster") -> str:
    from heliostat import local

    usage = local.measure_usage(cluster)
    bounds = cluster.state.bounds
    path = shlex.quote(str(cluster.home.path))
    flag = "" if cluster.home == local.locate() else f" --home {path}"
    lines = [
        ("S3 store", f"{cluster.s3_url}, bucket {cluster.root}"),
        ("", _render_usage(usage.get("store"))),
        ("Ray", f"{cluster.gcs_address}, dashboard {cluster.dashboard_url}"),
        ("", _render_usage(usage.get("ray"))),
        (
            "",
            f"{bounds.logical_cpus} logical CPUs, {bounds.memory_bytes / GIB:.1f} GiB of memory, "
            f"{bounds.object_store_bytes / GIB:.1f} GiB for objects",
        ),
        *_list_pools(cluster),
        ("Ray Serve", f"{cluster.serve_url}, for this machine alone"),
        ("Edge", f"{cluster.edge_url}, for clients"),
        ("", _render_usage(usage.get("edge"))),
        ("Home", str(cluster.home.path)),
        ("Shell", f'eval "$(heliostat env{flag})"'),
    ]
    return "\n".join(f"{name:10} {text}" for name, text in lines)


def _list_pools(cluster: "Cluster") -> Iterator[tuple[str, str]]:
    """What the autoscaler may bring, and what it has brought."""
    from heliostat import local
    from heliostat.pools import list_node_types

    if cluster.state.pools is None:
        return
    nodes = local.list_nodes(cluster)
    for place, node_type in enumerate(list_node_types(cluster.state.pools)):
        mine = [f"{node.name} ({node.market})" for node in nodes if node.type == node_type.name]
        has = ", ".join(f"{count} {name}" for name, count in node_type.machine_resources.items())
        there = f"{len(mine)} of at most {node_type.max_workers}: {' '.join(mine)}".rstrip(": ")
        yield "Nodes" if place == 0 else "", f"{node_type.name}, each {has}; {there}"


def _render_usage(usage: "Usage | None") -> str:
    if usage is None:
        return "does not run: `heliostat up` starts it again"
    count = "1 process" if len(usage.pids) == 1 else f"{len(usage.pids)} processes"
    more = " ..." if len(usage.pids) > SHOWN_PIDS else ""
    pids = " ".join(map(str, usage.pids[:SHOWN_PIDS]))
    return f"{count}, {usage.memory_bytes / MIB:.0f} MiB, pid {pids}{more}"
