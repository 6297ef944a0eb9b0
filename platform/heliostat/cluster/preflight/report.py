"""What a check has found, as a value: nodes, findings, and the rates of each node."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from heliostat.cluster.preflight.bucket import Rate
from heliostat.cluster.preflight.finding import Finding, list_failed_nodes, shorten
from heliostat.cluster.preflight.links import Fabric, Speed

MAX_NAMED = 3


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
    """`findings` have the worst first; `rates` are bytes/s of a node by what was measured."""

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

    def explain(self) -> str:
        """The first failures in a sentence."""
        told = [
            f"{shorten(one.node)}: {one.check}: {one.measured}: {one.advice}"
            for one in self.failed[:MAX_NAMED]
        ]
        more = len(self.failed) - MAX_NAMED
        return "; ".join(told) + f"; and {more} more" * (more > 0)

    def to_json(self) -> dict[str, object]:
        return {
            "nodes": [asdict(node) for node in self.nodes],
            "findings": [asdict(finding) for finding in self.findings],
            "rates": self.rates,
            "failed_nodes": self.failed_nodes,
            "seconds": round(self.seconds, 1),
        }


def count_nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count:,} nodes"


def tabulate(
    nodes: Sequence[Node], rates: Mapping[str, Rate], fabrics: Sequence[Fabric]
) -> dict[str, dict[str, float]]:
    """By node: what it writes and reads, and the best that any pair with it reached."""
    table: dict[str, dict[str, float]] = {node.id: {} for node in nodes}
    for node, rate in rates.items():
        table[node] |= {"bucket write": rate.write, "bucket read": rate.read}
    for fabric in fabrics:
        for pair, speed in fabric.pairs.items():
            for node in pair:
                for name, value in _name_rates(fabric.backend, speed).items():
                    table[node][name] = max(value, table[node].get(name, 0.0))
    return table


def _name_rates(backend: str, speed: Speed | None) -> dict[str, float]:
    return {
        f"{backend} send": speed.send if speed else 0.0,
        f"{backend} all-reduce": speed.reduce if speed else 0.0,
        f"{backend} all-gather": speed.gather if speed else 0.0,
    }
