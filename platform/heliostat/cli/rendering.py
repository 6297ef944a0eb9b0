"""`heliostat cluster render`, `check`: the files that a cluster in a cloud is started from."""

import argparse
from typing import TYPE_CHECKING

from heliostat.cli.options import Commands, add_parser

if TYPE_CHECKING:
    from heliostat.cluster.render import Provider

SUMMARY = "write the files of a cluster in a cloud, and check one that was changed"
PROVIDERS = ("aws", "gcp", "kuberay")


def add_commands(commands: Commands) -> None:
    parser = commands.add_parser("cluster", help=SUMMARY, description=SUMMARY)
    own = parser.add_subparsers(required=True, metavar="COMMAND")
    command = add_parser(
        own,
        "render",
        render_files,
        "write what `ray up` or KubeRay start a cluster from",
        [
            "heliostat cluster render --provider aws training.max_workers=8 > cluster.yaml",
            "heliostat cluster render --provider gcp project=my-project --out cluster.yaml",
            "heliostat cluster render --provider kuberay my.yaml image=r.io/heliostat:1 --out k8s",
        ],
    )
    command.add_argument("--provider", choices=PROVIDERS, default="aws", help="(aws)")
    command.add_argument(
        "settings",
        nargs="*",
        metavar="FILE key=value",
        help="a description of the cluster, if there is one, and changes of it",
    )
    command.add_argument(
        "--out",
        metavar="PATH",
        help="a folder for all files, or PATH.yaml for the first, which is printed otherwise",
    )
    command = add_parser(
        own,
        "check",
        check_file,
        "say what a cluster.yaml breaks, before anything is started (exit status 2)",
        ["heliostat cluster check cluster.yaml"],
    )
    command.add_argument("path", metavar="FILE", help="a config of Ray's launcher")


def render_files(options: argparse.Namespace) -> None:
    from pathlib import Path

    from heliostat.cluster.render import describe, render
    from heliostat.errors import HeliostatError

    provider: Provider = options.provider
    words: list[str] = options.settings
    path = words[0] if words and "=" not in words[0] else None
    files = render(provider, describe(provider, path, tuple(words[path is not None :])))
    first = next(iter(files))
    if options.out is None:
        print(files[first], end="")
        return
    out = Path(options.out)
    places = {out: first} if out.suffix == ".yaml" else {out / name: name for name in files}
    try:
        for place, name in places.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(files[name])
            print(place)
    except OSError as error:
        raise HeliostatError(f"--out {options.out} cannot be written: {error}") from error


def check_file(options: argparse.Namespace) -> None:
    import logging

    from heliostat.cluster.config import RULES, check

    logging.getLogger("ray.autoscaler").setLevel(logging.ERROR)
    check(options.path)
    print(f"{options.path}: Ray takes it, and it keeps all {len(RULES)} rules")
    for rule in RULES:
        print(f"  {rule}")
