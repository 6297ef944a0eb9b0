"""`heliostat usage`: what was asked of the models, added up."""

import argparse
import json
from dataclasses import asdict
from datetime import date

from heliostat.cli.options import Commands, add_command, add_json, add_root, open_store
from heliostat.cli.output import render_table


def add_commands(commands: Commands) -> None:
    command = add_command(
        commands,
        "usage",
        show_usage,
        "add up what was used: requests, errors, rows, tokens, seconds",
        [
            "heliostat usage",
            "heliostat usage --by day --since 2026-11-01 --json",
            "heliostat usage --prune-before 2026-01-01",
        ],
    )
    add_root(command)
    command.add_argument("--by", default="key", choices=("key", "model", "day"))
    command.add_argument("--since", type=_parse_day, metavar="DAY", help="YYYY-MM-DD, in UTC")
    command.add_argument(
        "--prune-before", type=_parse_day, metavar="DAY", help="delete the records of days before"
    )
    add_json(command)


def show_usage(options: argparse.Namespace) -> None:
    from heliostat import usage

    if options.prune_before:
        count = usage.prune(open_store(options), options.prune_before)
        print(f"{count:,} objects with records of days before {options.prune_before} were deleted")
        return
    sums = usage.summarise(open_store(options), options.by, options.since)
    if options.json:
        print(json.dumps(sums, default=asdict))
    elif sums:
        header = [options.by, *asdict(usage.Sum())]
        rows = [
            [name or "-", *(f"{round(value, 1):,}" for value in asdict(one).values())]
            for name, one in sums.items()
        ]
        print(render_table(header, rows))
    else:
        print(f"No request has been recorded in {options.root} for that time.")


def _parse_day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a day: give YYYY-MM-DD") from error
