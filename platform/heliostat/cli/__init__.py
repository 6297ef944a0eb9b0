"""`heliostat ...`: parse, call, print."""

import argparse
from collections.abc import Sequence

from heliostat.cli import cluster, deploy, keys, models, upload, usage
from heliostat.job import conclude

GROUPS = (cluster, upload, models, deploy, keys, usage)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status, see `conclude`."""
    options = _build_parser().parse_args(arguments)
    return conclude(lambda: options.run(options))


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="heliostat", description="From raw data in a bucket to answers over HTTP, on Ray."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in GROUPS:
        group.add_commands(commands)
    return parser
