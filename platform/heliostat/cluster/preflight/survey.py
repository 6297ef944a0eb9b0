"""A check of a whole cluster: an inspector on every node, questions in stages, one report."""

import contextlib
import itertools
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from heliostat import storage
from heliostat.cluster.preflight import (
    bucket,
    clock,
    gpu,
    guard,
    links,
    room,
    rounds,
    sockets,
    versions,
)
from heliostat.cluster.preflight.finding import (
    Finding,
    list_failed_nodes,
    shorten,
    sort_findings,
)
from heliostat.cluster.preflight.inspector import GLOO, NCCL, Account, Inspector
from heliostat.cluster.preflight.limits import Limits
from heliostat.cluster.preflight.links import Fabric, Speed
from heliostat.cluster.preflight.rounds import Pair
from heliostat.errors import HeliostatError
from heliostat.spec import RunSpec

QUESTIONS = 5
EXCHANGE_SECONDS = 10.0
END_SECONDS = 10.0
HEAD = "node:__internal_head__"
MAX_REASON = 200
MAX_NAMED = 3

Say = Callable[[str], None]
Actors = Mapping[str, Any]


@dataclass(frozen=True)
class Node:
    """One that is alive; `resources` are those that its Ray declares."""

    id: str
    host: str
    address: str
    resources: Mapping[str, float]

    @property
    def name(self) -> str:
        return f"{self.host} {shorten(self.id)}"


@dataclass(frozen=True)
class Report:
    """What was found, the worst first; `rates` are bytes/s of a node by what was measured."""

    nodes: tuple[Node, ...]
    findings: tuple[Finding, ...]
    rates: Mapping[str, Mapping[str, float]]
    seconds: float

    @property
    def failed(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "failed"]

    @property
    def failed_nodes(self) -> list[str]:
        return list_failed_nodes(self.findings)

    @property
    def status(self) -> int:
        """The exit status: 1 where something failed."""
        return 1 if self.failed else 0

    def to_json(self) -> dict[str, object]:
        nodes = [asdict(node) for node in self.nodes]
        findings = [asdict(finding) for finding in self.findings]
        return {
            "nodes": nodes,
            "findings": findings,
            "rates": self.rates,
            "failed_nodes": self.failed_nodes,
            "seconds": round(self.seconds, 1),
        }


def require_healthy(spec: RunSpec) -> None:
    """With `train.preflight` a quick check of the nodes that a run may use, before it holds any.

    Raises:
        HeliostatError: something failed; the sentence has the first findings and what to do.
    """
    if not spec.train.preflight:
        return
    report = check(spec.root, Limits(quick=True), print_line, spec.train.avoid_nodes)
    if report.failed:
        first = "; ".join(
            f"{shorten(one.node)}: {one.check}: {one.measured}: {one.advice}"
            for one in report.failed[:MAX_NAMED]
        )
        more = len(report.failed) - MAX_NAMED
        raise HeliostatError(f"train.preflight found {first}" + f"; and {more} more" * (more > 0))


def check(root: str, limits: Limits, say: Say, skipped: Iterable[str] = ()) -> Report:
    """Ask every node of the cluster that Ray is pointed at, but those that are `skipped`.

    Nothing stays: no actor, and no object in the bucket of `root`.

    Raises:
        HeliostatError: there is no cluster to ask, or `root` is no place.
    """
    began = time.monotonic()
    store = storage.connect(root)
    connect()
    nodes = {node.id: node for node in _list_nodes(skipped)}

    def tell(what: str) -> None:
        say(f"{time.monotonic() - began:5.1f} s  {what}")

    tell(f"asking {count_nodes(len(nodes))}")
    with _inspect(nodes) as actors:
        accounts, silent = _describe(nodes, actors, limits)
        tell(f"{len(accounts)} of {count_nodes(len(nodes))} told what they run")
        findings = [*_judge_silence(silent, limits), *_judge_accounts(nodes, accounts, limits)]
        awake = {node: actors[node] for node in accounts}
        findings += clock.judge_clocks(_ask_clocks(awake, limits), limits.clock_seconds)
        tell("clocks compared")
        rates, refusals = _try_bucket(store.uri, awake, limits, tell)
        findings += bucket.judge_bucket(rates, refusals, limits.slow_share)
        tell(f"{count_nodes(len(rates))} wrote to {store.uri} and read it again")
        fabrics = [] if limits.quick else _measure_fabrics(nodes, accounts, awake, limits, tell)
    findings += itertools.chain(*(links.judge_fabric(one, limits.slow_share) for one in fabrics))
    return Report(
        tuple(nodes.values()),
        tuple(sort_findings(findings)),
        _tabulate(nodes, rates, fabrics),
        time.monotonic() - began,
    )


def count_nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count:,} nodes"


def print_line(line: str) -> None:
    print(line, flush=True)


def connect(**options: Any) -> None:
    """Join the cluster that the environment names, with `options` of `ray.init`, once.

    Raises:
        HeliostatError: there is none, or it does not let this process in.
    """
    if ray.is_initialized():
        return
    try:
        ray.init("auto", **options)
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        raise HeliostatError(
            f"cannot reach a Ray cluster ({_reason(error)}): start one with `heliostat up`, or "
            "set RAY_ADDRESS, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to yours"
        ) from error


def _list_nodes(skipped: Iterable[str]) -> list[Node]:
    """Raises HeliostatError: none is left to ask."""
    found = [
        Node(
            node["NodeID"],
            node["NodeManagerHostname"],
            node["NodeManagerAddress"],
            node["Resources"],
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in set(skipped)
    ]
    if not found:
        raise HeliostatError("no node of the cluster is left to ask: shorten train.avoid_nodes")
    return sorted(found, key=lambda node: (HEAD not in node.resources, node.address, node.id))


@contextlib.contextmanager
def _inspect(nodes: Mapping[str, Node]) -> Iterator[dict[str, Any]]:
    """An inspector on each node, by the node's id; they end with the context."""
    make = ray.remote(Inspector)
    actors = {
        node: make.options(
            num_cpus=0,
            max_restarts=2,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        ).remote()
        for node in nodes
    }
    try:
        yield actors
    finally:
        for actor in actors.values():
            ray.kill(actor)


def _ask(questions: Mapping[str, Any], seconds: float) -> tuple[dict[str, Any], dict[str, str]]:
    """The answers that came within `seconds`, and in their place the reasons why one did not."""
    ready, _ = _wait(questions, seconds)
    answers, failures = {}, {}
    for node, question in questions.items():
        if question not in ready:
            failures[node] = f"no answer in {seconds:g} s"
            continue
        try:
            answers[node] = ray.get(question)
        except RayTaskError as error:
            failures[node] = _reason(error.cause)
        except RayError as error:
            failures[node] = _reason(error)
    return answers, failures


def _wait(questions: Mapping[str, Any], seconds: float) -> tuple[list[Any], list[Any]]:
    """The questions that are answered, and those that are not."""
    asked = list(questions.values())
    ready, open_ = ray.wait(asked, num_returns=len(asked), timeout=seconds) if asked else ([], [])
    return ready, open_


def _reason(error: BaseException) -> str:
    words = " ".join(str(error).split())[:MAX_REASON]
    return words if isinstance(error, HeliostatError) else f"{type(error).__name__}: {words}"


def _describe(
    nodes: Mapping[str, Node], actors: Actors, limits: Limits
) -> tuple[dict[str, Account], dict[str, str]]:
    questions = {
        node: actors[node].describe.remote(
            HEAD in described.resources, int(described.resources.get("object_store_memory", 0))
        )
        for node, described in nodes.items()
    }
    return _ask(questions, limits.answer_seconds)


def _judge_silence(silent: Mapping[str, str], limits: Limits) -> list[Finding]:
    advice = (
        "see `ray list nodes` and the raylet's log on this node, and keep it out of training or "
        f"restart its Ray; a node that is only slow gets more than {limits.answer_seconds:g} s by "
        "answer_seconds"
    )
    return [Finding(node, "answer", "failed", why, advice) for node, why in silent.items()]


def _judge_accounts(
    nodes: Mapping[str, Node], accounts: Mapping[str, Account], limits: Limits
) -> list[Finding]:
    laptop = all(node.address.startswith("127.") for node in nodes.values())
    available = ray._private.state.available_resources_per_node()
    gpus = {}
    for node, account in accounts.items():
        declared = nodes[node].resources.get("GPU", 0)
        in_use = available.get(node, {}).get("GPU", 0) < declared
        gpus[node] = gpu.Gpus(account.gpus, declared, in_use, account.gpu_error)
    return [
        *versions.judge_versions({node: one.versions for node, one in accounts.items()}),
        *guard.judge_guard({node: one.guard for node, one in accounts.items()}),
        *sockets.judge_sockets({node: one.listeners for node, one in accounts.items()}, laptop),
        *room.judge_room(
            {node: one.room for node, one in accounts.items()}, limits.disk_gib, limits.memory_gib
        ),
        *gpu.judge_gpus(gpus),
    ]


def _ask_clocks(actors: Actors, limits: Limits) -> dict[str, clock.Offset]:
    """One node after the other, so that no question waits behind another."""
    offsets = {}
    for node, actor in actors.items():
        samples = []
        for _ in range(QUESTIONS):
            sent = time.time()
            answers, _ = _ask({node: actor.tell_time.remote()}, limits.answer_seconds)
            if not answers:
                break
            samples.append((sent, answers[node], time.time()))
        if samples:
            offsets[node] = clock.estimate_offset(samples)
    return offsets


def _try_bucket(
    root: str, actors: Actors, limits: Limits, tell: Say
) -> tuple[dict[str, bucket.Rate], dict[str, str]]:
    """All nodes at once, as in a run, each below a prefix that it empties again."""
    uri = f"{root}/.heliostat-check-{secrets.token_hex(8)}"
    questions = {
        node: actor.try_bucket.remote(f"{uri}/{shorten(node)}") for node, actor in actors.items()
    }
    try:
        return _ask(questions, limits.answer_seconds)
    finally:
        _end_late(actors, questions)
        if not bucket.empty(storage.connect(uri)):
            tell(f"could not empty {uri}: remove what is left there")


def _end_late(actors: Actors, questions: Mapping[str, Any]) -> None:
    """End the inspectors that still work at a question: afterwards none of them does."""
    _, late = _wait(questions, 0)
    for node, question in questions.items():
        if question in late:
            ray.kill(actors[node])
    _wait(questions, END_SECONDS)


def _measure_fabrics(
    nodes: Mapping[str, Node],
    accounts: Mapping[str, Account],
    actors: Actors,
    limits: Limits,
    tell: Say,
) -> list[Fabric]:
    """All nodes over gloo, and those with GPUs once more over NCCL, a GPU each."""
    members = {GLOO: list(actors), NCCL: [node for node in actors if accounts[node].gpus]}
    return [
        _measure_fabric(backend, [nodes[name] for name in names], actors, limits, tell)
        for backend, names in members.items()
        if len(names) > 1
    ]


def _measure_fabric(
    backend: str, nodes: Sequence[Node], actors: Actors, limits: Limits, tell: Say
) -> Fabric:
    names = [node.id for node in nodes]
    drawn = rounds.draw_rounds(names)
    kept = rounds.cap_rounds(drawn, limits.pairs)
    speeds: dict[Pair, Speed | None] = {}
    for pairs in kept:
        speeds |= _exchange(backend, pairs, actors)
    all_pairs = sum(map(len, drawn))
    tell(f"{backend}: {len(speeds)} of {all_pairs} pairs in {len(kept)} rounds")
    whole = _exchange(backend, [tuple(names)], actors)[tuple(names)]
    tell(f"{backend}: all {len(names)} together")
    on_one_machine = len({(node.host, node.address) for node in nodes}) == 1
    place = "loopback" if on_one_machine else limits.machine
    return Fabric(backend, speeds, whole, len(names), all_pairs, place)


def _exchange(
    backend: str, groups: Sequence[tuple[str, ...]], actors: Actors
) -> dict[Any, Speed | None]:
    """The speed of each of several disjoint groups, which all measure at the same time."""
    patience = EXCHANGE_SECONDS
    opened = {group[0]: actors[group[0]].open_meeting.remote(len(group)) for group in groups}
    meetings, _ = _ask(opened, 2 * patience)
    answers, _ = _ask(
        {
            node: actors[node].exchange.remote(
                backend, meetings[group[0]], rank, len(group), patience
            )
            for group in groups
            if group[0] in meetings
            for rank, node in enumerate(group)
        },
        2 * patience,
    )
    return {
        group: links.slowest([answers[node] for node in group if node in answers], len(group))
        for group in groups
    }


def _tabulate(
    nodes: Mapping[str, Node], rates: Mapping[str, bucket.Rate], fabrics: Sequence[Fabric]
) -> dict[str, dict[str, float]]:
    """By node: what it writes and reads, and the rates of its fastest pair."""
    table: dict[str, dict[str, float]] = {node: {} for node in nodes}
    for node, rate in rates.items():
        table[node] |= {"bucket write": rate.write, "bucket read": rate.read}
    for fabric in fabrics:
        for pair, speed in fabric.pairs.items():
            for node in pair if speed else ():
                for name, value in _name_rates(fabric.backend, speed).items():
                    table[node][name] = max(value, table[node].get(name, 0.0))
    return table


def _name_rates(backend: str, speed: Speed | None) -> dict[str, float]:
    if speed is None:
        return {}
    return {
        f"{backend} send": speed.send,
        f"{backend} all-reduce": speed.reduce,
        f"{backend} all-gather": speed.gather,
    }
