"""What a check has found on one node: how bad it is, what was measured, and what to do."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "failed"]
ORDER: tuple[Level, ...] = ("failed", "warning", "ok")
# In the place of a node: the process that asks, and what belongs to no node alone.
ASKER, CLUSTER = "this process", "the cluster"


@dataclass(frozen=True)
class Finding:
    """`node` is the id of a node of Ray, ASKER or CLUSTER; `advice` says in a sentence what to do
    where the level is not ok."""

    node: str
    check: str
    level: Level
    measured: str
    advice: str = ""


def sort_findings(findings: Iterable[Finding]) -> list[Finding]:
    """The worst first, else in the order in which they were found."""
    return sorted(findings, key=lambda finding: ORDER.index(finding.level))


def list_failed_nodes(findings: Iterable[Finding]) -> list[str]:
    """The ids of the nodes that a finding failed, each once."""
    failed = (one.node for one in findings if one.level == "failed")
    return list(dict.fromkeys(node for node in failed if node not in (ASKER, CLUSTER)))


def shorten(node: str) -> str:
    """Enough of a node's id to tell it from others."""
    return node if node in (ASKER, CLUSTER) else node[:8]
