"""Inspectors that meet in process groups: in pairs, round after round, and all at once."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from heliostat.cluster.preflight.asking import Actors, ask
from heliostat.cluster.preflight.inspector import GLOO, NCCL, Account
from heliostat.cluster.preflight.limits import Limits
from heliostat.cluster.preflight.links import Fabric, Speed, slowest
from heliostat.cluster.preflight.report import Node
from heliostat.cluster.preflight.rounds import Pair, cap_rounds, draw_rounds

Group = TypeVar("Group", bound=tuple[str, ...])


def measure_fabrics(
    nodes: Sequence[Node], accounts: Mapping[str, Account], actors: Actors, limits: Limits
) -> list[Fabric]:
    """All nodes over gloo, and those with GPUs once more over NCCL, a GPU each."""
    members = {
        GLOO: [node for node in nodes if node.id in accounts],
        NCCL: [node for node in nodes if node.id in accounts and accounts[node.id].gpus],
    }
    return [
        _measure_fabric(backend, present, actors, limits)
        for backend, present in members.items()
        if len(present) > 1
    ]


def _measure_fabric(backend: str, nodes: Sequence[Node], actors: Actors, limits: Limits) -> Fabric:
    names = tuple(node.id for node in nodes)
    drawn = draw_rounds(names)
    speeds: dict[Pair, Speed | None] = {}
    for pairs in cap_rounds(drawn, limits.pairs):
        speeds |= _exchange(backend, pairs, actors, limits)
    whole = _exchange(backend, [names], actors, limits)[names]
    on_one_machine = len({(node.host, node.address) for node in nodes}) == 1
    place = "loopback" if on_one_machine else limits.machine
    return Fabric(backend, speeds, whole, len(names), sum(map(len, drawn)), place)


def _exchange(
    backend: str, groups: Sequence[Group], actors: Actors, limits: Limits
) -> dict[Group, Speed | None]:
    """The speed of each of several disjoint groups, which all measure at the same time.

    A group gives up before its inspectors count as silent, so that they are free for the next.
    """
    opened = {group[0]: actors[group[0]].open_meeting.remote(len(group)) for group in groups}
    meetings, _ = ask(opened, limits.answer_seconds)
    questions = {
        node: actors[node].exchange.remote(
            backend, meetings[group[0]], rank, len(group), limits.answer_seconds / 2
        )
        for group in groups
        if group[0] in meetings
        for rank, node in enumerate(group)
    }
    answers, _ = ask(questions, limits.answer_seconds)
    return {
        group: slowest([answers[node] for node in group if node in answers], len(group))
        for group in groups
    }
