"""`heliostat check`: what is wrong with a cluster, before anything runs on it."""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from heliostat.cli.options import Commands, add_command, add_json, add_root, open_store
from heliostat.cli.output import print_now, render_table

if TYPE_CHECKING:
    from heliostat.cluster.preflight.report import Report

GB = 10**9


def add_commands(commands: Commands) -> None:
    command = add_command(
        commands,
        "check",
        check,
        "ask every node of the cluster what is wrong (exit status 1: something is)",
        [
            "heliostat check",
            "heliostat check --quick --json | jq -r .failed_nodes[]",
            "heliostat check --root s3://mine --pairs 512 machine=g6.xlarge disk_gib=50",
        ],
    )
    add_root(command)
    add_json(command)
    command.add_argument("--quick", action="store_true", help="leave out the rates between nodes")
    command.add_argument("--pairs", metavar="N", help="measure so many pairs of nodes at most")
    command.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help="answer_seconds, clock_seconds, disk_gib, memory_gib, slow_share, machine",
    )


def check(options: argparse.Namespace) -> int:
    _point_at_cluster(options)  # before Ray is imported, which reads the environment then
    from heliostat.cluster.preflight import asking, survey
    from heliostat.cluster.preflight.limits import Limits
    from heliostat.spec import parse_options

    settings = list(options.settings)
    settings += ["quick=true"] * options.quick
    settings += [f"pairs={options.pairs}"] if options.pairs else []
    limits = parse_options(Limits, tuple(settings))
    asking.connect(log_to_driver=False, logging_level="ERROR")
    report = survey.check(options.root, limits, _say_nothing if options.json else print_now)
    print(json.dumps(report.to_json(), indent=1) if options.json else render(report))
    return report.status


def render(report: "Report") -> str:
    """What is not ok first, then the rest, the rates of each node, and how to do without some."""
    return "\n".join(["", *_list_findings(report), *_list_rates(report), "", *_conclude(report)])


def _list_findings(report: "Report") -> Iterator[str]:
    """One line for each check that several nodes passed: what the first of them had."""
    names = {node.id: node.name for node in report.nodes}
    passed = [one for one in report.findings if one.level == "ok"]
    alike = Counter(one.check for one in passed)
    first = {one.check: one for one in reversed(passed)}
    shown = [one for one in report.findings if one.level != "ok" or one is first[one.check]]
    rows = []
    for one in shown:
        more = alike[one.check] - 1 if one.level == "ok" else 0
        node = names.get(one.node, one.node) + (f" + {more}" if more else "")
        rows.append((one.level, node, one.check, one.measured))
    lines = render_table(("level", "node", "check", "measured"), rows).split("\n")
    yield lines[0]
    for line, one in zip(lines[1:], shown, strict=True):
        yield line
        if one.advice:
            yield f"{'':9}-> {one.advice}"


def _list_rates(report: "Report") -> Iterator[str]:
    columns = list(dict.fromkeys(name for rates in report.rates.values() for name in rates))
    if not columns:
        return
    rows = [
        (
            node.name,
            *(f"{report.rates[node.id].get(name, 0.0) / GB:.2f}" for name in columns),
        )
        for node in report.nodes
    ]
    yield ""
    yield from render_table(("GB/s", *columns), rows).split("\n")


def _conclude(report: "Report") -> Iterator[str]:
    from heliostat.cluster.preflight.report import count_nodes

    counts = ", ".join(
        f"{sum(one.level == level for one in report.findings)} {level}"
        for level in ("failed", "warning", "ok")
    )
    yield f"{count_nodes(len(report.nodes))} in {report.seconds:.1f} s: {counts}"
    if 0 < len(report.failed_nodes) < len(report.nodes):
        failed = ",".join(report.failed_nodes)
        yield "without the nodes that failed:"
        yield f"  a run: 'train.avoid_nodes=[{failed}]'"
        yield f"  Ray:   label_selector={{'ray.io/node-id': '!in({failed})'}}"


def _point_at_cluster(options: argparse.Namespace) -> None:
    """At that of RAY_ADDRESS, else at the laptop's of `--home`, if it runs."""
    # Ray would try for ten minutes to get into a cluster that does not let it in.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    if "RAY_ADDRESS" not in os.environ:
        from heliostat import local

        if cluster := local.find(local.locate(options.home)):
            os.environ.update(cluster.env)
    open_store(options)


def _say_nothing(line: str) -> None:
    """In place of progress, where only JSON is wanted."""
