"""`heliostat watch-spot`, `drain`: a node that will go hands over its work first."""

import argparse
import os
import re
import time
from pathlib import Path

from heliostat.cli.options import Commands, add_command
from heliostat.cli.output import print_now
from heliostat.errors import printable

CLAIM = "~/.heliostat-watch-spot"


def add_commands(commands: Commands) -> None:
    _add_watch(commands)
    command = add_command(
        commands,
        "drain",
        drain,
        "tell Ray that a node will go: training saves and leaves it, replicas move",
        [
            "heliostat drain",
            "heliostat drain 10.0.3.7 --seconds 120 --reason 'a new kernel'",
            "heliostat drain --dry-run",
        ],
    )
    command.add_argument(
        "node",
        nargs="?",
        metavar="NODE",
        help="its address, the first digits of its id, or its cloud's name of it (here)",
    )
    command.add_argument(
        "--seconds", type=_parse_seconds, metavar="N", help="until the node goes (not known)"
    )
    command.add_argument("--reason", default="by hand", metavar="TEXT", help="for Ray's logs")
    command.add_argument("--dry-run", action="store_true", help="only say which node that is")
    _add_address(command)


def watch_spot(options: argparse.Namespace) -> None:
    from heliostat.cluster.notice import choose_source
    from heliostat.cluster.spot import Claim, Watch, drain_by_command

    source = choose_source(options.source, options.metadata_url)
    target = [*([options.node] if options.node else []), *_pass_on(options)]
    claim = Claim(Path(options.claim).expanduser())
    _say(f"watching {source.name}, asked every {source.poll_seconds:g} s, for {_name(target)}")
    watch = Watch(source, drain_by_command(target), _say, options.heed_advice)
    try:
        while claim.holds():
            watch.look()
            time.sleep(source.poll_seconds)
        _say("a newer watch of this machine has begun: this one ends")
    except SystemExit:
        _say("this watch is ended by SIGTERM")
        raise


def drain(options: argparse.Namespace) -> None:
    _point_at_home(options)
    from heliostat.cluster.drain import Drainer, choose_node, find_cluster

    drainer = Drainer(find_cluster(options.address))
    node = choose_node(drainer.list_nodes(), options.node)
    if options.dry_run:
        print(f"node {node}")
        return
    drainer.drain(node, options.reason, options.seconds)
    end = "" if options.seconds is None else f" and goes in {options.seconds} s"
    print(f"node {node} drains{end}")


def _add_watch(commands: Commands) -> None:
    command = add_command(
        commands,
        "watch-spot",
        watch_spot,
        "drain this node when its cloud gives notice that it takes the machine back",
        [
            "heliostat watch-spot --source aws",
            "heliostat watch-spot --source file:/run/leaving",
        ],
    )
    command.add_argument(
        "--source", default="auto", help="aws, gcp, file:PATH, or auto: who answers here (auto)"
    )
    command.add_argument(
        "--metadata-url", metavar="URL", help="where the cloud's metadata server is"
    )
    command.add_argument(
        "--heed-advice", action="store_true", help="drain for a rebalance recommendation as well"
    )
    command.add_argument("--node", help="as of `heliostat drain` (that of this machine)")
    command.add_argument(
        "--claim", default=CLAIM, metavar="FILE", help=f"the newest watch of it goes on ({CLAIM})"
    )
    _add_address(command)


def _add_address(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--address", metavar="HOST:PORT", help="of Ray (RAY_ADDRESS, or the one of this machine)"
    )


def _pass_on(options: argparse.Namespace) -> list[str]:
    given = {"--address": options.address, "--home": options.home}
    return [word for name, text in given.items() if text for word in (name, text)]


def _name(target: list[str]) -> str:
    """The node, or why it is not known now."""
    from heliostat.cluster.spot import Refused, run_drain

    try:
        return run_drain([*target, "--dry-run"])
    except Refused as error:
        return f"a node that is not known yet: {error}"


def _point_at_home(options: argparse.Namespace) -> None:
    """Before Ray is imported: at the laptop cluster of `--home`, unless another one is named."""
    from heliostat import local

    if options.address is None and "RAY_ADDRESS" not in os.environ:
        cluster = local.find(local.locate(options.home))
        os.environ.update(cluster.env if cluster else {})


def _say(line: str) -> None:
    from heliostat.cluster.spot import render_time

    print_now(f"{render_time(time.time())} {printable(' '.join(line.split()))}")


def _parse_seconds(text: str) -> int:
    """Raises ArgumentTypeError: what is no whole number above 0."""
    if not re.fullmatch("0*[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text} are no seconds: give a whole number from 1 on")
    return int(text)
