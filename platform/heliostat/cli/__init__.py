"""`heliostat ...`: parse, call, print."""

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from heliostat.cli import cluster, deploy, keys, models, upload, usage
from heliostat.errors import HeliostatError

GROUPS = (cluster, upload, models, deploy, keys, usage)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 2 after a sentence, 130 after Ctrl-C."""
    signal.signal(signal.SIGTERM, _unwind)
    options = _build_parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except HeliostatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: interrupted", file=sys.stderr)
        return 130


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="heliostat", description="From raw data in a bucket to answers over HTTP, on Ray."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in GROUPS:
        group.add_commands(commands)
    return parser


def _unwind(signum: int, frame: object) -> NoReturn:
    """SIGTERM ends like Ctrl-C, so that a half-started cluster is stopped."""
    sys.exit(128 + signum)
