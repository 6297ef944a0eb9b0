"""`heliostat ...`: parse, call, print."""

import argparse
from collections.abc import Sequence

from heliostat.cli import (
    check,
    cluster,
    deploy,
    jobs,
    keys,
    models,
    nodes,
    plan,
    rendering,
    upload,
    usage,
)
from heliostat.job import conclude

GROUPS = (cluster, rendering, nodes, check, upload, plan, jobs, models, deploy, keys, usage)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status, see `conclude`."""
    options = _parse(arguments)
    return conclude(lambda: options.run(options))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Settings may stand behind an option, where argparse takes no more of a list."""
    parser = _build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and ("settings" not in options or any(one.startswith("-") for one in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.settings += rest
    return options


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="heliostat", description="From raw data in a bucket to answers over HTTP, on Ray."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in GROUPS:
        group.add_commands(commands)
    return parser
