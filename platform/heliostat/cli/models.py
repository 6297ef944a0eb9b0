"""`heliostat models` and `export`: the published versions, and where they came from."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, TypedDict

from heliostat.cli.options import (
    Commands,
    add_command,
    add_json,
    add_reference,
    add_root,
    add_subcommand,
    open_store,
)
from heliostat.cli.output import render_table

if TYPE_CHECKING:
    from heliostat.registry import Lineage, Version


class Model(TypedDict):
    versions: "list[Version]"
    aliases: dict[str, int]


def add_commands(commands: Commands) -> None:
    models = add_command(
        commands,
        "models",
        list_models,
        "list the published versions, or show where one came from",
        ["heliostat models --root s3://my-bucket", "heliostat models show digits:3"],
    )
    add_root(models)
    add_json(models)
    own = models.add_subparsers(metavar="COMMAND")
    show = add_subcommand(
        own,
        "show",
        show_model,
        "walk from a version back to the shards it was trained on",
        ["heliostat models show digits:3", "heliostat models show digits@production"],
    )
    add_reference(show)
    alias = add_subcommand(
        own,
        "alias",
        move_alias,
        "let an alias, as `production`, name a version",
        ["heliostat models alias digits:3 production"],
    )
    add_reference(alias)
    alias.add_argument("alias", metavar="ALIAS", help="found as NAME@ALIAS from then on")
    _add_export(commands)


def list_models(options: argparse.Namespace) -> None:
    from heliostat import registry

    store = open_store(options)
    models: dict[str, Model] = {
        name: {
            "versions": registry.list_versions(store, name),
            "aliases": registry.list_aliases(store, name),
        }
        for name in registry.list_names(store)
    }
    if options.json:
        print(json.dumps(models, default=asdict))
    elif models:
        print(_render_models(models))
    else:
        print(f"No model has been published to {options.root} yet.")


def show_model(options: argparse.Namespace) -> None:
    from heliostat import registry

    lineage = registry.trace(open_store(options), options.ref)
    print(json.dumps(asdict(lineage)) if options.json else _render_lineage(lineage))


def move_alias(options: argparse.Namespace) -> None:
    from heliostat import registry

    store = open_store(options)
    version = registry.resolve(store, options.ref)
    registry.set_alias(store, version.name, options.alias, version.number)
    alias = f"{version.name}@{options.alias}"
    print(json.dumps({alias: version.ref}) if options.json else f"{alias} is {version.ref}")


def export(options: argparse.Namespace) -> None:
    from heliostat import registry, storage
    from heliostat.export import export_hf

    store = open_store(options)
    version = registry.resolve(store, options.ref)
    target = storage.connect(options.target)
    keys = export_hf(store, version, target)
    print(f"{version.ref} as {', '.join(keys)}")
    print(target.uri)


def _add_export(commands: Commands) -> None:
    command = add_command(
        commands,
        "export",
        export,
        "write a published version as files that another library loads",
        [
            "heliostat export sotu:3 --to hf sotu-llama",
            "heliostat export sotu@production --to hf s3://my-bucket/exports/sotu",
        ],
    )
    add_reference(command)
    command.add_argument(
        "--to", required=True, choices=("hf",), help="hf: a Llama directory for transformers (gpt)"
    )
    command.add_argument("target", metavar="DIR", help="a directory or s3://bucket/prefix")
    add_root(command)


def _render_models(models: dict[str, Model]) -> str:
    rows = [
        (
            version.ref,
            version.created,
            _render_metrics(version.metrics),
            " ".join(name for name, number in of["aliases"].items() if number == version.number),
        )
        for of in models.values()
        for version in of["versions"]
    ]
    return render_table(("version", "published", "metrics", "aliases"), rows)


def _render_lineage(lineage: "Lineage") -> str:
    version = lineage.version
    counts = ", ".join(f"{count} {split}" for split, count in lineage.rows.items())
    facts = [
        ("version", f"{version.ref}, published {version.created}"),
        ("weights", f"{version.weights_sha256}, {version.weights_bytes} bytes"),
        ("metrics", _render_metrics(version.metrics)),
        ("run", f"{version.run}, step {version.step}"),
        ("code", version.code or "not stored"),
        ("data", f"{version.data_name} {version.data_version}, rows: {counts or 'not known'}"),
        ("source", lineage.source or "not known"),
        *(("missing", key) for key in lineage.missing),
    ]
    shards = [(shard.split, shard.rows, shard.sha256[:16], shard.key) for shard in lineage.shards]
    return "\n".join(
        [
            *(f"{name:8} {text}" for name, text in facts),
            "",
            render_table(("split", "rows", "SHA-256", "shard"), shards),
        ]
    )


def _render_metrics(metrics: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in metrics.items())
