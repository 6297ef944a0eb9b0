"""Nodes that a run keeps off: what the others have, and how Ray is told of it."""

from collections import Counter
from collections.abc import Collection

import ray

NODE_ID = "ray.io/node-id"  # a label that every node has


def select_others(avoided: Collection[str]) -> dict[str, str] | None:
    """The label selector of all nodes but the `avoided`; None where none is."""
    return {NODE_ID: f"!in({','.join(avoided)})"} if avoided else None


def list_resources(avoided: Collection[str]) -> dict[str, dict[str, float]]:
    """What each living node declares, by its id, the `avoided` left out."""
    return {
        node["NodeID"]: node["Resources"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in avoided
    }


def sum_resources(avoided: Collection[str]) -> dict[str, float]:
    """What the living nodes but the `avoided` declare together."""
    total: Counter[str] = Counter()
    for resources in list_resources(avoided).values():
        total.update(resources)
    return dict(total)
