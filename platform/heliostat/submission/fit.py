"""Whether a cluster can ever run what is asked of it: arithmetic over nodes and kinds of nodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from heliostat.errors import HeliostatError

Resources = Mapping[str, float]
SHOWN_KINDS = 4
PLENTY = 10**9


@dataclass(frozen=True)
class Kind:
    """Nodes that are alike: what each has, and how many there can be."""

    name: str
    resources: Resources
    most: int

    def count_places(self, need: Resources) -> int:
        """How many of `need` all nodes of this kind hold at most."""
        held = (self.resources.get(name, 0) // amount for name, amount in need.items() if amount)
        return self.most * int(min(held, default=PLENTY))


@dataclass(frozen=True)
class Need:
    """So many processes of one shape, and CPUs beside them, which may be anywhere."""

    what: str
    each: Resources
    count: int = 1
    beside_cpus: int = 0
    remedy: str = "ask for less, or use a larger cluster"


def check_fit(need: Need, kinds: Sequence[Kind]) -> None:
    """Raises HeliostatError with the numbers if no state of the cluster could hold `need`."""
    each = show(need.each)
    places = sum(kind.count_places(need.each) for kind in kinds)
    if not places:
        raise HeliostatError(
            f"{need.what} needs {each}, and no node of this cluster can have that "
            f"({describe(kinds)}): {need.remedy}"
        )
    if places < need.count:
        raise HeliostatError(
            f"{need.count} times {need.what} with {each} each do not fit this cluster, where "
            f"there is room for {places} at most ({describe(kinds)}): {need.remedy}"
        )
    asked = need.count * need.each.get("CPU", 0) + need.beside_cpus
    if asked > (total := sum(kind.most * kind.resources.get("CPU", 0) for kind in kinds)):
        raise HeliostatError(
            f"{need.count} times {need.what} with {each} each and {need.beside_cpus} CPU beside "
            f"them, to read their rows, make {asked:g} CPU, and this cluster has {total:g} at most "
            f"({describe(kinds)}): {need.remedy}"
        )


def describe(kinds: Sequence[Kind]) -> str:
    """`1 x head with 4 CPU, 4 x gpu with 8 CPU and 1 GPU`, the largest first."""

    def rank(kind: Kind) -> tuple[float, float]:
        return -kind.resources.get("GPU", 0), -kind.resources.get("CPU", 0)

    told = [
        f"{kind.most} x {kind.name} with {show(kind.resources)}" for kind in sorted(kinds, key=rank)
    ]
    more = len(told) - SHOWN_KINDS
    return ", ".join(told[:SHOWN_KINDS]) + f" and {more} more" * (more > 0)


def show(resources: Resources) -> str:
    """`1 CPU and 2 GPU`, and then what else there is by name."""
    names = ("CPU", "GPU", *sorted(resources.keys() - {"CPU", "GPU"}))
    told = [f"{resources[name]:g} {name}" for name in names if resources.get(name)]
    return " and ".join(told) or "no CPU"
