"""`heliostat deploy`, `rollback`, `deployments`: which version of a model answers."""

import argparse
import json
from typing import TYPE_CHECKING

from heliostat.cli.options import (
    Commands,
    add_command,
    add_json,
    add_reference,
    add_root,
    open_store,
)
from heliostat.cli.output import render_table

if TYPE_CHECKING:
    from heliostat.spec import DeploySpec
    from heliostat.storage import Store


def add_commands(commands: Commands) -> None:
    _add_deploy(commands)
    command = add_command(
        commands,
        "rollback",
        rollback,
        "serve the version of a model that was served before",
        ["heliostat rollback digits"],
    )
    command.add_argument("name", metavar="NAME")
    add_root(command)
    command = add_command(
        commands,
        "deployments",
        list_deployments,
        "list what is served, what is kept to go back to, and the candidates",
        ["heliostat deployments", "heliostat deployments --json"],
    )
    add_root(command)
    add_json(command)


def deploy(options: argparse.Namespace) -> None:
    from heliostat import registry
    from heliostat.serve.deploy import deploy

    store = open_store(options)
    version = registry.resolve(store, options.ref)
    print(deploy(store, version.name, _read_terms(options, store, version.number)))


def rollback(options: argparse.Namespace) -> None:
    from heliostat.serve.deploy import rollback

    print(rollback(open_store(options), options.name))


def list_deployments(options: argparse.Namespace) -> None:
    from heliostat.serve.table import read_table

    table = read_table(open_store(options))
    if options.json:
        print(table.model_dump_json())
        return
    rows = [
        (
            f"{name}:{placed.number}",
            ", ".join(map(str, placed.previous)),
            f"{placed.candidate.number}, {placed.candidate.terms.mode}" if placed.candidate else "",
        )
        for name, placed in table.models.items()
    ]
    shown = render_table(("served", "kept", "candidate"), rows)
    print(shown if rows else f"Nothing of {options.root} is deployed.")


def _add_deploy(commands: Commands) -> None:
    command = add_command(
        commands,
        "deploy",
        deploy,
        "serve a published version, at once or first as a candidate",
        [
            "heliostat deploy digits:4",
            "heliostat deploy digits:4 replicas=2 max_latency_ms=20",
            "heliostat deploy digits:4 --canary 10% candidate.by=key candidate.min_requests=500",
            "heliostat deploy digits:4 --shadow 100% candidate.max_difference=0.01",
        ],
    )
    add_reference(command)
    command.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of a spec's `deploy`")
    way = command.add_mutually_exclusive_group()
    way.add_argument(
        "--canary", type=_parse_share, metavar="SHARE", help="let it answer so many requests first"
    )
    way.add_argument(
        "--shadow", type=_parse_share, metavar="SHARE", help="ask it as well and compare answers"
    )
    add_root(command)


def _read_terms(options: argparse.Namespace, store: "Store", number: int) -> "DeploySpec":
    """How the models are served now, changed by what the command line says."""
    from heliostat.serve.table import read_table
    from heliostat.spec import DeploySpec, parse_options

    share = options.canary or options.shadow
    mode = "canary" if options.canary else "shadow"
    candidate = [f"candidate.mode={mode}", f"candidate.share={share}"] if share else []
    now = read_table(store).deploy.model_dump(mode="json", exclude_defaults=True)
    kept = [f"{key}={json.dumps(value)}" for key, value in now.items()]
    settings = (*kept, *candidate, *options.settings, f"version={number}")
    return parse_options(DeploySpec, settings)


def _parse_share(text: str) -> float:
    """10% or 0.1."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: give one above 0%, up to 100%")
    return share
