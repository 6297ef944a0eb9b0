"""Where the processes of a node of Ray listen, and which of them should only do so on loopback."""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import psutil

from heliostat.cluster.preflight.finding import Finding

# By the beginning of a process's title: what it is, and whether it asks nobody for the token.
PROGRAMS = (
    ("gcs_server", "GCS", False),
    ("raylet", "raylet", False),
    ("dashboard", "dashboard", True),
    ("haproxy", "Serve's HAProxy", True),
    ("proxy", "Serve's proxy", True),
    ("replica", "a replica of Serve", True),
    ("agent", "dashboard agent", False),
    ("client", "Ray Client", False),
    ("monitor", "autoscaler metrics", False),
    ("worker", "a worker", False),
)
MAX_SHOWN = 6


@dataclass(frozen=True, order=True)
class Listener:
    """`program` is the first word of a row of PROGRAMS."""

    program: str
    address: str
    port: int

    @property
    def is_open(self) -> bool:
        return not ipaddress.ip_address(self.address).is_loopback


def list_listeners(processes: Iterable[psutil.Process]) -> tuple[Listener, ...]:
    """The TCP ports on which these processes listen; one that ends meanwhile has none."""
    found = set()
    for process in processes:
        try:
            program = _name(process)
            connections = process.net_connections("tcp")
        except psutil.Error:
            continue
        for one in connections:
            if one.status == psutil.CONN_LISTEN:
                # An IPv6 socket of Ray's that talks IPv4.
                address = one.laddr.ip.removeprefix("::ffff:")
                found.add(Listener(program, address, one.laddr.port))
    return tuple(sorted(found))


def judge_sockets(found: Mapping[str, Iterable[Listener]], laptop: bool) -> list[Finding]:
    """On a laptop's cluster nothing may be open; on one of several machines, whose nodes must reach
    each other, that which asks for no token is named."""
    findings = []
    for node, listeners in found.items():
        opened = [one for one in listeners if one.is_open]
        if laptop and opened:
            advice = (
                "start this node of a laptop's cluster on 127.0.0.1 (`heliostat up`), else whoever "
                "is on the network reaches it"
            )
            findings.append(Finding(node, "ports", "failed", _show(opened), advice))
            continue
        asking = {program: label for program, label, is_free in PROGRAMS if is_free}
        free = [one for one in opened if one.program in asking]
        if free:
            advice = (
                "bind it to 127.0.0.1, as cluster.yaml does, or let a firewall keep these ports "
                "to the nodes: it asks nobody for the token"
            )
            findings.append(Finding(node, "ports", "warning", _show(free), advice))
        else:
            shown = _show(opened) if opened else "all on loopback"
            findings.append(Finding(node, "ports", "ok", shown))
    return findings


def _name(process: psutil.Process) -> str:
    """Titles: `ray::DashboardAgent`, `ray::ServeReplica:...`, `.../dashboard/dashboard.py ...`."""
    name, title = process.name(), " ".join(process.cmdline())
    marks = {
        "gcs_server": name == "gcs_server",
        "raylet": name == "raylet",
        "haproxy": name.startswith("haproxy"),
        "proxy": "Proxy" in title and title.startswith("ray::"),
        "replica": title.startswith("ray::ServeReplica"),
        "dashboard": "dashboard/dashboard.py" in title or title.startswith("ray-dashboard"),
        "agent": "Agent" in title or "agent" in title,
        "client": "ray.util.client.server" in title,
        "monitor": "monitor.py" in title,
    }
    return next((program for program, holds in marks.items() if holds), "worker")


def _show(listeners: Iterable[Listener]) -> str:
    labels = {program: label for program, label, _ in PROGRAMS}
    shown = [f"{labels[one.program]} {one.address}:{one.port}" for one in listeners]
    more = f" and {len(shown) - MAX_SHOWN} more" if len(shown) > MAX_SHOWN else ""
    return f"open: {', '.join(shown[:MAX_SHOWN])}{more}"
