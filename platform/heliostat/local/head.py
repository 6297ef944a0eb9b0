"""A Ray head with Serve on it: with which environment it is launched and when it is up."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from heliostat.environment import (
    EDGE_HOST,
    EDGE_URL,
    LOOPBACK,
    REPLICA_PORTS,
    REQUIRED,
    TUNED,
    Ports,
)
from heliostat.errors import HeliostatError
from heliostat.local import processes, scaling
from heliostat.local.edge import describe, find_haproxy
from heliostat.local.home import Home, State, write_private
from heliostat.pools import POOLS, tell

NAME = "ray"
READY_SECONDS = 180.0
STAND_IN_SECONDS = 60
# Without a buffer, so that the last line of the log is the last thing that was said.
PYTHON = [sys.executable, "-u", "-P", "-m"]
# How Serve's HAProxy is started. Serve binds its statistics to every address and has no setting for
# that. At first it knows no replicas, would answer 404, and takes clients only once Serve starts it
# anew with what it knows (-sf). One whose keeper was killed answers until then, and goes. For one
# that is killed itself another stands in at once: its keeper would take many seconds. A line for
# each request would go to the port of a syslog that nobody runs.
START = """#!/bin/sh
for word; do
    case $word in
    -sf) knows=yes ;;
    *.cfg) config=$word ;;
    esac
done
sed -i -E -e 's/^( *bind )[*]?:/\\1127.0.0.1:/' -e '/^ *log 127.0.0.1:514 /d' "$config"
before=
for pid in $(cat "$config.pids" 2> /dev/null); do
    grep -Fqs "$config" "/proc/$pid/cmdline" && before="$before $pid"
done
if [ $knows ]; then
    set -- "$@" -sf $before
    {{
        tail -s 0.2 --pid=$$ -f /dev/null
        [ "$(sed 's/.* //' "$config.pids")" = $$ ] || exit
        {program} -db -f "$config" &
        echo $! > "$config.pids"
        sleep {stand_in_seconds}
        kill -USR1 $!
    }} > /dev/null 2>&1 &
else
    sed -i "/^frontend http_frontend/,/ bind /s/bind .*/bind abns@idle-$$/" "$config"
fi
echo $before $$ > "$config.pids"
exec {program} "$@"
"""


def render_start(program: str) -> str:
    """The script that starts the HAProxy `program` for Serve."""
    return START.format(program=shlex.quote(program), stand_in_seconds=STAND_IN_SECONDS)


def compose_environment(state: State, credentials: Mapping[str, str]) -> dict[str, str]:
    """The environment of every Ray process; jobs, workers and replicas inherit `credentials`.

    What the user's environment says about a tuned setting wins over our table.
    """
    return {
        **{setting.name: setting.value for setting in TUNED},
        **processes.clean_environment(),
        **{setting.name: setting.value for setting in (*REQUIRED, LOOPBACK)},
        **credentials,
        **_place(state.ports, state.scratch),
        EDGE_URL: describe(state).url,
        EDGE_HOST: state.listen.host,
        **({POOLS: tell(state.pools)} if state.pools else {}),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_closed_haproxy(state)),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }


def launch(home: Home, state: State, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Run `ray start --head`, which ends when the node is registered."""
    closed = _closed_haproxy(state)
    write_private(closed, render_start(find_haproxy()))
    closed.chmod(0o700)
    options = {
        "port": state.ports.gcs,
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": state.ports.dashboard,
        "ray-client-server-port": state.ports.ray_client,
        "dashboard-agent-listen-port": 0,
        "metrics-export-port": 0,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "num-cpus": state.bounds.logical_cpus,
        "memory": state.bounds.memory_bytes,
        "object-store-memory": state.bounds.object_store_bytes,
        "temp-dir": state.ray_directory,
    }
    if state.pools:
        options["autoscaling-config"] = scaling.write_config(home, state, state.pools)
        environment = {**environment, **scaling.SETTINGS}
    command = [*PYTHON, "ray.scripts.scripts", "start", "--head"]
    command += ["--disable-usage-stats", *(f"--{name}={value}" for name, value in options.items())]
    return processes.launch(state.marker(NAME), command, environment, home.ray_log)


def launch_serve(
    home: Home, state: State, environment: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    """Import Ray Serve, beside the start of Ray, in a process that waits for `let_serve_start`."""
    address = f"127.0.0.1:{state.ports.gcs}"
    command = [*PYTHON, "heliostat.local.ingress", address]
    command += [str(state.ports.serve)]
    return processes.launch(
        state.marker(NAME), command, environment, home.serve_log, stdin=subprocess.PIPE
    )


def let_serve_start(driver: "subprocess.Popen[bytes]") -> None:
    assert driver.stdin is not None
    driver.stdin.close()


def await_end(command: "subprocess.Popen[bytes]", what: str, log: Path) -> None:
    """Wait until `command` has done its work.

    Raises:
        HeliostatError: it failed or took too long; quotes the last line of its log.
    """
    try:
        failed = command.wait(READY_SECONDS) != 0
    except subprocess.TimeoutExpired:
        failed = True
    if failed:
        lines = log.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing logged")
        raise HeliostatError(f"{what} did not start: {last} (the whole log is {log})")


def _closed_haproxy(state: State) -> Path:
    return state.scratch / "haproxy"


def _place(ports: Ports, scratch: Path) -> dict[str, str]:
    """Ports of this cluster's own, and HAProxy's world-writable admin socket in private scratch.

    Serve puts HAProxy's files into a folder named after the node, and HAProxy takes no socket path
    above 97 characters: there is no room for a folder of ours between the two.
    """
    return {
        "TMPDIR": str(scratch),  # Ray's dashboard leaves a folder behind wherever that is
        "AUTOSCALER_METRIC_PORT": str(ports.autoscaler_metrics),
        "DASHBOARD_METRIC_PORT": str(ports.dashboard_metrics),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.serve_metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.serve_stats),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.serve_fallback),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports.replicas),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.replicas + REPLICA_PORTS),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{scratch}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{scratch}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{scratch}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{scratch}/server-state",
    }
