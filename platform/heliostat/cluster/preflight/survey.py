"""A check of a whole cluster: an inspector on every node, questions in stages, one report."""

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import ray

from heliostat import storage
from heliostat.cluster.preflight import bucket, clock, gpu, guard, links, room, sockets, versions
from heliostat.cluster.preflight.asking import (
    HEAD,
    Actors,
    ask,
    connect,
    end_late,
    inspect,
    list_nodes,
)
from heliostat.cluster.preflight.finding import Finding, shorten, sort_findings
from heliostat.cluster.preflight.inspector import Account
from heliostat.cluster.preflight.limits import Limits
from heliostat.cluster.preflight.meeting import measure_fabrics
from heliostat.cluster.preflight.report import Node, Report, count_nodes, tabulate
from heliostat.errors import HeliostatError
from heliostat.spec import RunSpec

QUESTIONS = 5
Say = Callable[[str], None]


def require_healthy(spec: RunSpec) -> None:
    """With `train.preflight` a quick check of the nodes that a run may use, before it holds any.

    Raises:
        HeliostatError: something failed; the sentence has the first findings and what to do.
    """
    if not spec.train.preflight:
        return
    report = check(spec.root, Limits(quick=True), print_line, spec.train.avoid_nodes)
    if report.failed:
        raise HeliostatError(f"train.preflight found {report.explain()}")


def check(root: str, limits: Limits, say: Say, skipped: Iterable[str] = ()) -> Report:
    """Ask every node of the cluster that Ray is pointed at, but those that are `skipped`.

    Nothing stays: no actor, and no object in the bucket of `root`.

    Raises:
        HeliostatError: there is no cluster to ask, or `root` is no place.
    """
    began = time.monotonic()
    uri = storage.connect(root).uri
    connect()
    nodes = list_nodes(skipped)

    def tell(what: str) -> None:
        say(f"{time.monotonic() - began:5.1f} s  {what}")

    tell(f"asking {count_nodes(len(nodes))}")
    with inspect(nodes) as actors:
        accounts, silent = _describe(nodes, actors, limits)
        tell(f"{len(accounts)} of {count_nodes(len(nodes))} told what they run")
        awake = {node: actors[node] for node in accounts}
        offsets, fallen_silent = _ask_clocks(awake, limits)
        tell("clocks compared")
        rates, refusals = _try_bucket(uri, awake, limits, tell)
        tell(f"{count_nodes(len(rates))} wrote to {uri} and read it again")
        fabrics = [] if limits.quick else measure_fabrics(nodes, accounts, awake, limits)
        for fabric in fabrics:
            tell(f"{fabric.backend}: {len(fabric.pairs)} of {fabric.all_pairs} pairs measured")
    findings = [
        *_judge_silence(silent | fallen_silent, limits),
        *_judge_accounts(nodes, accounts, limits),
        *clock.judge_clocks(offsets, limits.clock_seconds),
        *bucket.judge_bucket(rates, refusals, limits.slow_share),
        *(one for fabric in fabrics for one in links.judge_fabric(fabric, limits.slow_share)),
    ]
    table = tabulate(nodes, rates, fabrics)
    seconds = time.monotonic() - began
    return Report(tuple(nodes), tuple(sort_findings(findings)), table, seconds)


def print_line(line: str) -> None:
    print(line, flush=True)


def _describe(
    nodes: Sequence[Node], actors: Actors, limits: Limits
) -> tuple[dict[str, Account], dict[str, str]]:
    questions = {
        node.id: actors[node.id].describe.remote(
            HEAD in node.resources, int(node.resources.get("object_store_memory", 0))
        )
        for node in nodes
    }
    return ask(questions, limits.answer_seconds)


def _judge_silence(silent: Mapping[str, str], limits: Limits) -> list[Finding]:
    advice = (
        "see `ray list nodes` and the raylet's log on this node, and keep it out of training or "
        f"restart its Ray; a node that is only slow gets more than {limits.answer_seconds:g} s by "
        "answer_seconds"
    )
    return [Finding(node, "answer", "failed", why, advice) for node, why in silent.items()]


def _judge_accounts(
    nodes: Sequence[Node], accounts: Mapping[str, Account], limits: Limits
) -> list[Finding]:
    laptop = all(node.address.startswith("127.") for node in nodes)
    told = accounts.items()
    rooms = {node: account.room for node, account in told}
    return [
        *versions.judge_versions({node: account.versions for node, account in told}),
        *guard.judge_guard({node: account.guard for node, account in told}),
        *sockets.judge_sockets({node: account.listeners for node, account in told}, laptop),
        *room.judge_room(rooms, limits.disk_gib, limits.memory_gib),
        *gpu.judge_gpus(_count_gpus(nodes, accounts)),
    ]


def _count_gpus(nodes: Sequence[Node], accounts: Mapping[str, Account]) -> dict[str, gpu.Gpus]:
    """What each driver sees beside what Ray counts, and whether Ray lent some of it."""
    declared = {node.id: node.resources.get("GPU", 0) for node in nodes}
    available = ray._private.state.available_resources_per_node()
    return {
        node: gpu.Gpus(
            account.gpus,
            declared[node],
            available.get(node, {}).get("GPU", 0) < declared[node],
            account.gpu_error,
            account.stands_in,
        )
        for node, account in accounts.items()
    }


def _ask_clocks(actors: Actors, limits: Limits) -> tuple[dict[str, clock.Offset], dict[str, str]]:
    """One node after the other, so that no question waits behind another."""
    offsets: dict[str, clock.Offset] = {}
    silent: dict[str, str] = {}
    for node, actor in actors.items():
        samples = []
        for _ in range(QUESTIONS):
            sent = time.time()
            answers, failures = ask({node: actor.tell_time.remote()}, limits.answer_seconds)
            if failures:
                silent |= failures
                break
            samples.append((sent, answers[node], time.time()))
        if samples:
            offsets[node] = clock.estimate_offset(samples)
    return offsets, silent


def _try_bucket(
    root: str, actors: Actors, limits: Limits, tell: Say
) -> tuple[dict[str, bucket.Rate], dict[str, str]]:
    """All nodes at once, as in a run, each below a prefix that it empties again."""
    uri = f"{root}/.heliostat-check-{secrets.token_hex(8)}"
    questions = {
        node: actor.try_bucket.remote(f"{uri}/{shorten(node)}") for node, actor in actors.items()
    }
    try:
        return ask(questions, limits.answer_seconds)
    finally:
        end_late(actors, questions)
        if not bucket.empty(storage.connect(uri)):
            tell(f"could not empty {uri}: remove what is left there")
