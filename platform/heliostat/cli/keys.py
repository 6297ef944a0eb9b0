"""`heliostat keys`: make, list and revoke the API keys of a bucket."""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from heliostat.cli.options import (
    Commands,
    add_command,
    add_json,
    add_root,
    add_subcommand,
    open_store,
)
from heliostat.cli.output import render_table

if TYPE_CHECKING:
    from heliostat.keys import Key


def add_commands(commands: Commands) -> None:
    parser = add_command(
        commands,
        "keys",
        list_keys,
        "make, list and revoke the API keys of a bucket",
        ["heliostat keys list", "heliostat keys create --owner ana@example.com"],
    )
    add_root(parser)
    add_json(parser)
    own = parser.add_subparsers(metavar="COMMAND")
    _add_create(own)
    add_subcommand(
        own,
        "list",
        list_keys,
        "what each key may do, and until when",
        ["heliostat keys list", "heliostat keys list --json | jq -r '.[].id'"],
    )
    revoke = add_subcommand(
        own,
        "revoke",
        revoke_key,
        "end a key for good, whether it still lives or not",
        ["heliostat keys revoke 0123456789abcdef"],
    )
    revoke.add_argument("id", metavar="ID", help="the 16 digits after hs_")


def create_key(options: argparse.Namespace) -> None:
    from heliostat import keys
    from heliostat.spec import parse_options

    token, key = keys.create(
        open_store(options),
        options.owner,
        models=options.models.split(","),
        verbs=options.verbs.split(",") if options.verbs else keys.VERBS,
        days=options.days,
        limits=parse_options(keys.Limits, tuple(options.limit)),
    )
    if options.json:
        print(json.dumps({"token": token, **_describe(key)}))
        return
    print(token)
    print(
        f"key {key.id} of {key.owner}: it is shown this once, and known to the replicas within "
        f"{keys.REFRESH_SECONDS:g} s",
        file=sys.stderr,
    )


def list_keys(options: argparse.Namespace) -> None:
    from heliostat import keys

    found = keys.list_keys(open_store(options))
    if options.json:
        print(json.dumps([_describe(key) for key in found]))
    elif found:
        print(_render(found))
    else:
        print(f"There is no key in {options.root} yet: make one with `heliostat keys create`.")


def revoke_key(options: argparse.Namespace) -> None:
    from heliostat import keys

    key = keys.revoke(open_store(options), options.id)
    if options.json:
        print(json.dumps(_describe(key)))
    else:
        print(f"key {key.id} of {key.owner} was revoked at {key.revoked:%Y-%m-%d %H:%M:%S} UTC")


def _add_create(commands: Commands) -> None:
    command = add_subcommand(
        commands,
        "create",
        create_key,
        "make a key and print it, this once",
        [
            "heliostat keys create --owner ana@example.com",
            "heliostat keys create --owner app --models digits,letters --verbs predict \\\n"
            "      --days 90 --limit requests_per_second=20 --limit rows_per_month=1000000",
        ],
    )
    command.add_argument("--owner", required=True, help="whose it is, as a name or an address")
    command.add_argument("--models", default="*", metavar="NAMES", help="a,b (default: all)")
    command.add_argument(
        "--verbs", metavar="VERBS", help="of predict,generate,explain,read (default: all)"
    )
    command.add_argument("--days", type=float, help="until it expires (default: never)")
    command.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="requests_per_second, tokens_per_minute, tokens_per_month or rows_per_month",
    )


def _describe(key: "Key") -> dict[str, Any]:
    described: dict[str, Any] = key.model_dump(mode="json", exclude={"sha256"})
    return described


def _render(found: "Sequence[Key]") -> str:
    rows = [
        (
            key.id,
            key.owner,
            ",".join(key.models),
            ",".join(key.verbs),
            " ".join(f"{one.name}={one.units:g}" for one in key.allowances) or "-",
            _render_time(key.created),
            _render_time(key.expires),
            _render_time(key.revoked),
        )
        for key in found
    ]
    header = ("key", "owner", "models", "verbs", "limits", "created", "expires", "revoked")
    return render_table(header, rows)


def _render_time(when: datetime | None) -> str:
    return f"{when:%Y-%m-%d %H:%M}" if when else "-"
