"""What the commands have in common: how one is added, and the options of many."""

import argparse
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from heliostat.errors import HeliostatError

if TYPE_CHECKING:
    from heliostat.pools import ClusterSpec
    from heliostat.storage import Store

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run: TypeAlias = Callable[[argparse.Namespace], int | None]

RAY_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
STORE_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "AWS_PROFILE")


def add_command(
    commands: Commands, name: str, run: Run, summary: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    parser = add_parser(commands, name, run, summary, examples)
    parser.add_argument(
        "--home", metavar="DIR", help="the cluster's home (default: HELIOSTAT_HOME, ~/.heliostat)"
    )
    return parser


def add_subcommand(
    commands: Commands, name: str, run: Run, summary: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """One below a command with `--root`, `--json` and `--home`, which may stand before or after."""
    parser = add_parser(commands, name, run, summary, examples)
    # SUPPRESS keeps what was given before the subcommand.
    parser.add_argument("--root", default=argparse.SUPPRESS, metavar="URI", help="where it is")
    parser.add_argument("--json", default=argparse.SUPPRESS, action="store_true", help="print JSON")
    parser.add_argument("--home", default=argparse.SUPPRESS, metavar="DIR", help="as above")
    return parser


def add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", default="s3://heliostat", metavar="URI", help="where it is")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_reference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ref", metavar="REF", help="NAME:NUMBER, NAME@ALIAS or NAME (its newest)")


def point_at_cluster(options: argparse.Namespace) -> None:
    """Have this process's environment name a Ray cluster: the laptop's, if it names none yet.

    Raises:
        HeliostatError: it names none, and nothing runs at `--home`.
    """
    from heliostat import local

    if any(name in os.environ for name in RAY_VARIABLES):
        return
    home = local.locate(options.home)
    cluster = local.find(home)
    if cluster is None:
        raise HeliostatError(
            f"nothing runs in {home.path}: start it with `heliostat up`, or set "
            "RAY_API_SERVER_ADDRESS to the dashboard of your cluster"
        )
    os.environ.update(cluster.env)


def open_store(options: argparse.Namespace) -> "Store":
    """The store at `--root`, at the laptop cluster of `--home` if no variable names another.

    Raises:
        HeliostatError: that is no place, or a bucket of the laptop cluster, which does not run.
    """
    from heliostat import local, storage

    if not any(name in os.environ for name in STORE_VARIABLES):
        home = local.locate(options.home)
        cluster = local.find(home)
        if cluster is None and f"{options.root}/".startswith(f"s3://{local.BUCKET}/"):
            raise HeliostatError(
                f"nothing runs in {home.path}: start it with `heliostat up`, or name your bucket"
            )
        os.environ.update(cluster.env if cluster else {})
    return storage.connect(options.root)


def load_cluster(path: str | None, settings: tuple[str, ...]) -> "ClusterSpec":
    """The description of a cluster in the file at `path`, or the default one, with `settings`.

    Raises:
        HeliostatError: the file cannot be read, or a key is unknown or out of range.
    """
    from heliostat import spec
    from heliostat.pools import ClusterSpec

    return spec.load_section(ClusterSpec, path, settings, ClusterSpec().model_dump(mode="json"))


def add_parser(
    commands: Commands, name: str, run: Run, summary: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n  ".join(["examples:", *examples]),
    )
    parser.set_defaults(run=run)
    return parser
