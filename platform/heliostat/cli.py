"""`heliostat ...`: parse, call, print."""

import argparse
import ipaddress
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict

from heliostat.errors import HeliostatError

if TYPE_CHECKING:
    from heliostat.keys import Key
    from heliostat.local import Cluster, Listen, Usage
    from heliostat.registry import Lineage, Version
    from heliostat.spec import DeploySpec
    from heliostat.storage import Store

MIB = 2**20
GIB = 2**30
OTHER_CREDENTIALS = ("AWS_PROFILE", "AWS_SESSION_TOKEN")
STORE_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "AWS_PROFILE")
SHOWN_PIDS = 8


class Model(TypedDict):
    versions: "list[Version]"
    aliases: dict[str, int]


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


def up(options: argparse.Namespace) -> None:
    from heliostat import local

    home = local.locate(options.home)
    listen = _read_listen(options)
    cluster = local.start(home, free_ports=options.free_ports, listen=listen, report=_print_now)
    print(f"\n{_render_status(cluster)}")


def run_edge(options: argparse.Namespace) -> None:
    from pathlib import Path

    from heliostat.edge import Edge
    from heliostat.local import Listen, edge

    listen = _read_listen(options) or Listen()
    wanted = Edge(
        options.port,
        options.upstream_port,
        listen.host,
        listen.certificate,
        spare_port=options.spare_port,
    )
    edge.replace(wanted, Path(options.config).expanduser().absolute())


def show_status(options: argparse.Namespace) -> int:
    from heliostat import local

    home = local.locate(options.home)
    cluster = local.find(home)
    if options.json:
        print(json.dumps(_describe(cluster) if cluster else {"home": str(home.path), "parts": {}}))
    elif cluster:
        print(_render_status(cluster))
    else:
        print(f"Nothing runs in {home.path}: start it with `heliostat up`.")
    return 0 if cluster else 1


def print_env(options: argparse.Namespace) -> None:
    from heliostat import local

    home = local.locate(options.home)
    cluster = local.find(home)
    if cluster is None:
        raise HeliostatError(f"nothing runs in {home.path}: start it with `heliostat up`")
    for name in OTHER_CREDENTIALS:
        print(f"unset {name}")
    for name, value in cluster.env.items():
        print(f"export {name}={shlex.quote(value)}")


def down(options: argparse.Namespace) -> None:
    from heliostat import local

    home = local.locate(options.home)
    began = time.monotonic()
    ended = local.stop(home)
    seconds = time.monotonic() - began
    print(f"Stopped {len(ended)} processes in {seconds:.1f} s." if ended else "Nothing ran.")
    if options.purge:
        size_bytes = local.purge(home)
        print(f"Removed {home.path}: objects, logs and secrets, {size_bytes / MIB:.1f} MiB.")
    elif home.exists:
        print(f"The data stays in {home.objects} (`heliostat down --purge` removes it).")


def list_models(options: argparse.Namespace) -> None:
    from heliostat import registry

    store = _open_store(options)
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

    lineage = registry.trace(_open_store(options), options.ref)
    print(json.dumps(asdict(lineage)) if options.json else _render_lineage(lineage))


def move_alias(options: argparse.Namespace) -> None:
    from heliostat import registry

    store = _open_store(options)
    version = registry.resolve(store, options.ref)
    registry.set_alias(store, version.name, options.alias, version.number)
    print(f"{version.name}@{options.alias} is {version.ref}")


def upload(options: argparse.Namespace) -> None:
    from pathlib import Path

    from heliostat import storage

    options.root = options.target
    target = _open_store(options)
    storage.probe(target)
    began = time.monotonic()
    count, size_bytes = storage.upload_folder(Path(options.folder), target, _print_now)
    seconds = time.monotonic() - began
    print(f"{count:,} files, {size_bytes / MIB:.1f} MiB in {seconds:.1f} s")
    print(target.uri)


def export(options: argparse.Namespace) -> None:
    from heliostat import registry, storage
    from heliostat.export import export_hf

    store = _open_store(options)
    version = registry.resolve(store, options.ref)
    target = storage.connect(options.target)
    keys = export_hf(store, version, target)
    print(f"{version.ref} as {', '.join(keys)}")
    print(target.uri)


def deploy(options: argparse.Namespace) -> None:
    from heliostat import registry
    from heliostat.serve.deploy import deploy

    store = _open_store(options)
    version = registry.resolve(store, options.ref)
    print(deploy(store, version.name, _read_terms(options, store, version.number)))


def rollback(options: argparse.Namespace) -> None:
    from heliostat.serve.deploy import rollback

    print(rollback(_open_store(options), options.name))


def list_deployments(options: argparse.Namespace) -> None:
    from heliostat.serve.table import read_table

    table = read_table(_open_store(options))
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
    shown = _render_table(("served", "kept", "candidate"), rows)
    print(shown if rows else f"Nothing of {options.root} is deployed.")


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


def _share(text: str) -> float:
    """10% or 0.1."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: give one above 0%, up to 100%")
    return share


def create_key(options: argparse.Namespace) -> None:
    from heliostat import keys
    from heliostat.spec import parse_options

    token, key = keys.create(
        _open_store(options),
        options.owner,
        models=options.models.split(","),
        verbs=options.verbs.split(",") if options.verbs else keys.VERBS,
        days=options.days,
        limits=parse_options(keys.Limits, tuple(options.limit)),
    )
    if options.json:
        print(json.dumps({"token": token, **_describe_key(key)}))
        return
    print(token)
    print(
        f"key {key.id} of {key.owner}: it is shown this once, and known to the replicas within "
        f"{keys.REFRESH_SECONDS:g} s",
        file=sys.stderr,
    )


def list_keys(options: argparse.Namespace) -> None:
    from heliostat import keys

    found = keys.list_keys(_open_store(options))
    if options.json:
        print(json.dumps([_describe_key(key) for key in found]))
    elif found:
        print(_render_keys(found))
    else:
        print(f"There is no key in {options.root} yet: make one with `heliostat keys create`.")


def revoke_key(options: argparse.Namespace) -> None:
    from heliostat import keys

    key = keys.revoke(_open_store(options), options.id)
    if options.json:
        print(json.dumps(_describe_key(key)))
    else:
        print(f"key {key.id} of {key.owner} was revoked at {key.revoked:%Y-%m-%d %H:%M:%S} UTC")


def show_usage(options: argparse.Namespace) -> None:
    from heliostat import usage

    sums = usage.summarise(_open_store(options), options.by, options.since)
    if options.json:
        print(json.dumps(sums, default=asdict))
    elif sums:
        header = [options.by, *asdict(usage.Sum())]
        rows = [
            [name or "-", *(f"{round(value, 1):,}" for value in asdict(one).values())]
            for name, one in sums.items()
        ]
        print(_render_table(header, rows))
    else:
        print(f"No request has been recorded in {options.root} for that time.")


def _read_listen(options: argparse.Namespace) -> "Listen | None":
    """Where the edge is asked to listen, if anything is asked for; warns of what is open.

    Raises:
        HeliostatError: that is no address, or the certificate cannot be read.
    """
    from pathlib import Path

    from heliostat.local import Listen

    if options.bind is None and options.tls_cert is None:
        return None
    path = options.tls_cert and str(Path(options.tls_cert).expanduser().absolute())
    listen = Listen(_read_address(options.bind or Listen().host), path)
    if path and not os.access(path, os.R_OK):
        raise HeliostatError(
            f"--tls-cert {options.tls_cert} cannot be read: it needs a PEM file with the "
            f"certificate, its chain and its key"
        )
    if not path and not ipaddress.ip_address(listen.host).is_loopback:
        print(
            f"warning: others reach {listen.host} without TLS, so keys and answers can be read "
            f"on the way: give --tls-cert FILE",
            file=sys.stderr,
        )
    return listen


def _read_address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise HeliostatError(
            f"--bind {text} is no IP address: give one of this machine, or 0.0.0.0 for all"
        ) from error


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="heliostat", description="From raw data in a bucket to answers over HTTP, on Ray."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_cluster_commands(commands)
    _add_model_commands(commands)
    _add_key_commands(commands)
    command = _add_command(
        commands,
        "upload",
        upload,
        "put the files of a local folder into a bucket, as raw data",
        ["heliostat upload my-images s3://heliostat/raw/my-images"],
    )
    command.add_argument("folder", metavar="FOLDER", help="its files keep their paths as keys")
    command.add_argument("target", metavar="URI", help="s3://bucket/prefix")
    command = _add_command(
        commands,
        "export",
        export,
        "write a published version as files that another library loads",
        [
            "heliostat export sotu:3 --to hf sotu-llama",
            "heliostat export sotu@production --to hf s3://my-bucket/exports/sotu",
        ],
    )
    command.add_argument("ref", metavar="REF", help="NAME:NUMBER, NAME@ALIAS or NAME (its newest)")
    command.add_argument(
        "--to", required=True, choices=("hf",), help="hf: a Llama directory for transformers (gpt)"
    )
    command.add_argument("target", metavar="DIR", help="a directory or s3://bucket/prefix")
    command.add_argument("--root", default="s3://heliostat", metavar="URI", help="where it is")
    _add_deploy_commands(commands)
    return parser


def _add_deploy_commands(commands: Any) -> None:
    command = _add_command(
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
    command.add_argument("ref", metavar="REF", help="NAME:NUMBER, NAME@ALIAS or NAME (its newest)")
    command.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of a spec's `deploy`")
    way = command.add_mutually_exclusive_group()
    way.add_argument(
        "--canary", type=_share, metavar="SHARE", help="let it answer so many requests first"
    )
    way.add_argument(
        "--shadow", type=_share, metavar="SHARE", help="ask it as well and compare the answers"
    )
    command.add_argument("--root", default="s3://heliostat", metavar="URI", help="where it is")
    command = _add_command(
        commands,
        "rollback",
        rollback,
        "serve the version of a model that was served before",
        ["heliostat rollback digits"],
    )
    command.add_argument("name", metavar="NAME")
    command.add_argument("--root", default="s3://heliostat", metavar="URI", help="where it is")
    command = _add_command(
        commands,
        "deployments",
        list_deployments,
        "list what is served, what is kept to go back to, and the candidates",
        ["heliostat deployments", "heliostat deployments --json"],
    )
    command.add_argument("--root", default="s3://heliostat", metavar="URI", help="whose models")
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_cluster_commands(commands: Any) -> None:
    command = _add_command(
        commands,
        "up",
        up,
        "start an S3 store, a Ray head with Serve, and the edge on this machine",
        [
            "heliostat up",
            "heliostat up --free-ports --home /tmp/second",
            "heliostat up --bind 0.0.0.0 --tls-cert edge.pem",
        ],
    )
    command.add_argument("--free-ports", action="store_true", help="choose ports that are free")
    _add_listen(command)
    command = _add_command(
        commands,
        "edge",
        run_edge,
        "run the edge alone, before a Ray Serve that this machine has already",
        ["heliostat edge --bind 0.0.0.0 --port 8443 --tls-cert edge.pem"],
    )
    _add_listen(command)
    command.add_argument("--port", type=_read_port, default=8080, help="listens there (8080)")
    command.add_argument(
        "--upstream-port", type=_read_port, default=8000, help="where Serve listens (8000)"
    )
    command.add_argument(
        "--spare-port", type=_read_port, help="where Serve's other proxy does, for when it is away"
    )
    command.add_argument(
        "--config", default="~/.heliostat-edge.cfg", metavar="FILE", help="is written there"
    )
    command = _add_command(
        commands,
        "status",
        show_status,
        "say what runs, where, and what it takes (exit status 1: nothing runs)",
        ["heliostat status", "heliostat status --json | jq -r .edge_url"],
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    _add_command(
        commands,
        "env",
        print_env,
        "print the variables that point a shell at the cluster",
        ['eval "$(heliostat env)"'],
    )
    command = _add_command(
        commands,
        "down",
        down,
        "stop exactly what `heliostat up` started; the data stays",
        ["heliostat down", "heliostat down --purge"],
    )
    command.add_argument("--purge", action="store_true", help="remove the data as well")


def _add_listen(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--bind", metavar="ADDRESS", help="address of the edge (127.0.0.1; 0.0.0.0: all of them)"
    )
    command.add_argument(
        "--tls-cert", metavar="FILE", help="PEM with certificate, chain and key: HTTPS"
    )


def _read_port(text: str) -> int:
    """Raises ArgumentTypeError: what is no port."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:6]) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port: give a number from 1 to 65535")
    return int(text)


def _add_model_commands(commands: Any) -> None:
    models = _add_command(
        commands,
        "models",
        list_models,
        "list the published versions, or show where one came from",
        ["heliostat models --root s3://my-bucket", "heliostat models show digits:3"],
    )
    models.add_argument("--root", default="s3://heliostat", metavar="URI", help="where they are")
    models.add_argument("--json", action="store_true", help="print JSON")
    commands = models.add_subparsers(metavar="COMMAND")
    show = commands.add_parser(
        "show", help="walk from a version back to the shards it was trained on"
    )
    _add_reference(show, show_model)
    show.add_argument("--json", default=argparse.SUPPRESS, action="store_true", help="print JSON")
    _explain(show, ["heliostat models show digits:3", "heliostat models show digits@production"])
    alias = commands.add_parser("alias", help="let an alias, as `production`, name a version")
    _add_reference(alias, move_alias)
    alias.add_argument("alias", metavar="ALIAS", help="found as NAME@ALIAS from then on")
    _explain(alias, ["heliostat models alias digits:3 production"])


def _add_key_commands(commands: Any) -> None:
    parser = _add_command(
        commands,
        "keys",
        list_keys,
        "make, list and revoke the API keys of a bucket",
        ["heliostat keys list", "heliostat keys create --owner ana@example.com"],
    )
    parser.add_argument("--root", default="s3://heliostat", metavar="URI", help="where they are")
    parser.add_argument("--json", action="store_true", help="print JSON")
    own = parser.add_subparsers(metavar="COMMAND")
    command = own.add_parser("create", help="make a key and print it, this once")
    _add_key_options(command, create_key)
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
    _explain(
        command,
        [
            "heliostat keys create --owner ana@example.com",
            "heliostat keys create --owner app --models digits,letters --verbs predict \\\n"
            "      --days 90 --limit requests_per_second=20 --limit rows_per_month=1000000",
        ],
    )
    command = own.add_parser("list", help="what each key may do, and until when")
    _add_key_options(command, list_keys)
    _explain(command, ["heliostat keys list", "heliostat keys list --json | jq -r '.[].id'"])
    command = own.add_parser("revoke", help="end a key for good, whether it still lives or not")
    command.add_argument("id", metavar="ID", help="the 16 digits after hs_")
    _add_key_options(command, revoke_key)
    _explain(command, ["heliostat keys revoke 0123456789abcdef"])
    command = _add_command(
        commands,
        "usage",
        show_usage,
        "add up what was used: requests, errors, rows, tokens, seconds",
        ["heliostat usage", "heliostat usage --by day --since 2026-11-01 --json"],
    )
    command.add_argument("--root", default="s3://heliostat", metavar="URI", help="where it is")
    command.add_argument("--by", default="key", choices=("key", "model", "day"))
    command.add_argument("--since", type=_parse_day, metavar="DAY", help="YYYY-MM-DD, in UTC")
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_key_options(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int | None]
) -> None:
    # Both places may name these; SUPPRESS keeps what was given before the subcommand.
    parser.add_argument("--root", default=argparse.SUPPRESS, metavar="URI", help="where they are")
    parser.add_argument("--home", default=argparse.SUPPRESS, metavar="DIR", help="see keys --help")
    parser.add_argument("--json", default=argparse.SUPPRESS, action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def _parse_day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a day: give YYYY-MM-DD") from error


def _add_reference(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int | None]
) -> None:
    parser.add_argument("ref", metavar="REF", help="NAME:NUMBER, NAME@ALIAS or NAME (its newest)")
    # Both places may name these; SUPPRESS keeps what was given before the subcommand.
    parser.add_argument("--root", default=argparse.SUPPRESS, metavar="URI", help="where it is")
    parser.add_argument(
        "--home", default=argparse.SUPPRESS, metavar="DIR", help="see models --help"
    )
    parser.set_defaults(run=run)


def _add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    summary: str,
    examples: list[str],
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary)
    parser.add_argument(
        "--home", metavar="DIR", help="the cluster's home (default: HELIOSTAT_HOME, ~/.heliostat)"
    )
    parser.set_defaults(run=run)
    _explain(parser, examples)
    return parser


def _explain(parser: argparse.ArgumentParser, examples: list[str]) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n  ".join(["examples:", *examples])


def _open_store(options: argparse.Namespace) -> "Store":
    """The store at `--root`, at the laptop cluster of `--home` if no variable names another."""
    from heliostat import local, storage

    if not any(name in os.environ for name in STORE_VARIABLES):
        cluster = local.find(local.locate(options.home))
        os.environ.update(cluster.env if cluster else {})
    return storage.connect(options.root)


def _describe(cluster: "Cluster") -> dict[str, Any]:
    from heliostat import local

    usage = local.measure_usage(cluster)
    return {
        "home": str(cluster.home.path),
        "root": cluster.root,
        "s3_url": cluster.s3_url,
        "dashboard_url": cluster.dashboard_url,
        "edge_url": cluster.edge_url,
        "serve_url": cluster.serve_url,
        "gcs_address": cluster.gcs_address,
        "bounds": asdict(cluster.state.bounds),
        "parts": {name: asdict(part) for name, part in usage.items()},
    }


def _render_status(cluster: "Cluster") -> str:
    from heliostat import local

    usage = local.measure_usage(cluster)
    bounds = cluster.state.bounds
    path = shlex.quote(str(cluster.home.path))
    flag = "" if cluster.home == local.locate() else f" --home {path}"
    lines = [
        ("S3 store", f"{cluster.s3_url}, bucket {cluster.root}"),
        ("", _render_usage(usage.get("store"))),
        ("Ray", f"{cluster.gcs_address}, dashboard {cluster.dashboard_url}"),
        ("", _render_usage(usage.get("ray"))),
        (
            "",
            f"{bounds.logical_cpus} logical CPUs, {bounds.memory_bytes / GIB:.1f} GiB of memory, "
            f"{bounds.object_store_bytes / GIB:.1f} GiB for objects",
        ),
        ("Ray Serve", f"{cluster.serve_url}, for this machine alone"),
        ("Edge", f"{cluster.edge_url}, for clients"),
        ("", _render_usage(usage.get("edge"))),
        ("Home", str(cluster.home.path)),
        ("Shell", f'eval "$(heliostat env{flag})"'),
    ]
    return "\n".join(f"{name:10} {text}" for name, text in lines)


def _render_usage(usage: "Usage | None") -> str:
    if usage is None:
        return "does not run: `heliostat up` starts it again"
    count = "1 process" if len(usage.pids) == 1 else f"{len(usage.pids)} processes"
    more = " ..." if len(usage.pids) > SHOWN_PIDS else ""
    pids = " ".join(map(str, usage.pids[:SHOWN_PIDS]))
    return f"{count}, {usage.memory_bytes / MIB:.0f} MiB, pid {pids}{more}"


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
    return _render_table(("version", "published", "metrics", "aliases"), rows)


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
            _render_table(("split", "rows", "SHA-256", "shard"), shards),
        ]
    )


def _render_metrics(metrics: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in metrics.items())


def _describe_key(key: "Key") -> dict[str, Any]:
    described: dict[str, Any] = key.model_dump(mode="json", exclude={"sha256"})
    return described


def _render_keys(found: "Sequence[Key]") -> str:
    def show(when: datetime | None) -> str:
        return f"{when:%Y-%m-%d %H:%M}" if when else "-"

    rows = [
        (
            key.id,
            key.owner,
            ",".join(key.models),
            ",".join(key.verbs),
            " ".join(f"{one.name}={one.units:g}" for one in key.allowances) or "-",
            show(key.created),
            show(key.expires),
            show(key.revoked),
        )
        for key in found
    ]
    header = ("key", "owner", "models", "verbs", "limits", "created", "expires", "revoked")
    return _render_table(header, rows)


def _render_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    table = [tuple(header), *(tuple(str(cell) for cell in row) for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def _print_now(line: str) -> None:
    print(line, flush=True)


def _unwind(signum: int, frame: object) -> NoReturn:
    """SIGTERM ends like Ctrl-C, so that a half-started cluster is stopped."""
    sys.exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
