"""The versions of what runs on a node, held against the other nodes and what was tested."""

import hashlib
import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import heliostat
from heliostat.cluster.preflight.finding import CLUSTER, Finding, Level

# As constraints.txt pins them; a test compares.
TESTED = {"python": "3.11", "ray": "2.60.0", "torch": "2.13.0"}
# Heliostat uses parts of Ray that its next version may change.
UNTESTED: dict[str, Level] = {"python": "warning", "ray": "failed", "torch": "warning"}
SHARED = ("python", "ray", "torch", "heliostat")


@dataclass(frozen=True)
class Versions:
    """`heliostat` is its version and the hash of its code; `torch` is without the kind of build."""

    python: str
    ray: str
    torch: str
    heliostat: str
    glibc: str
    arch: str


def read_versions() -> Versions:
    """Those of this process."""
    return Versions(
        platform.python_version(),
        metadata.version("ray"),
        metadata.version("torch").partition("+")[0],
        f"{heliostat.__version__}+{_hash_code(Path(heliostat.__file__).parent)}",
        platform.libc_ver()[1] or "none",
        platform.machine(),
    )


def judge_versions(found: Mapping[str, Versions]) -> list[Finding]:
    """A node that differs from most is failed; what most have may be untested."""
    findings: list[Finding] = []
    for name in SHARED:
        values = {node: str(asdict(versions)[name]) for node, versions in found.items()}
        findings += _judge_one(name, values)
    wrong = {finding.node for finding in findings}
    return [
        *findings,
        *(
            Finding(node, "versions", "ok", _describe(versions))
            for node, versions in found.items()
            if node not in wrong
        ),
    ]


def _judge_one(name: str, values: Mapping[str, str]) -> Iterator[Finding]:
    usual = _find_usual(name, values)
    for node, value in values.items():
        if value != usual:
            yield Finding(
                node,
                "versions",
                "failed",
                f"{name} {value}, most nodes have {usual}",
                f"install {name} {usual} on this node as on the others, from one image or with "
                "`pip install -c constraints.txt`, and start its Ray again",
            )
    if values and not _is_tested(name, usual):
        yield Finding(
            CLUSTER,
            "versions",
            UNTESTED[name],
            f"{name} {usual}, tested was {TESTED[name]}",
            f"install {name} {TESTED[name]} on every node, as constraints.txt says",
        )


def _find_usual(name: str, values: Mapping[str, str]) -> str:
    """The most frequent; of equally frequent ones that which was tested."""
    counts = Counter(values.values())
    return max(counts, key=lambda value: (counts[value], _is_tested(name, value)), default="")


def _is_tested(name: str, value: str) -> bool:
    return name not in TESTED or f"{value}.".startswith(f"{TESTED[name]}.")


def _describe(versions: Versions) -> str:
    return (
        f"Python {versions.python}, ray {versions.ray}, torch {versions.torch}, "
        f"heliostat {versions.heliostat}, glibc {versions.glibc}, {versions.arch}"
    )


def _hash_code(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:8]
