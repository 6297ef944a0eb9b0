"""What Ray's autoscaler says of nodes: which are asked for, which start, which did not come."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from ray.exceptions import RayError

from heliostat.errors import HeliostatError

# Ray keeps why a node did not come out of what its autoscaler answers, and has it in this file.
LOG, LOG_LINES = "monitor.log", 2000
REFUSAL = re.compile(r"Failed to launch \d+ nodes of type (\S+): (.*)")
MAX_WORDS = 300


@dataclass(frozen=True)
class Launches:
    """By node type: nodes that are asked for, that start, and when some were given up (Unix s)."""

    asked: Mapping[str, int]
    starting: Mapping[str, int]
    failed: Mapping[str, Sequence[float]]


def read_launches(address: str) -> Launches:
    """From the autoscaler of the cluster whose GCS is at `address`.

    Raises:
        HeliostatError: it does not answer.
    """
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        status = get_cluster_status(address, timeout=3)
    except (RayError, RuntimeError, OSError) as error:
        raise HeliostatError(
            f"the autoscaler at {address} does not answer ({type(error).__name__})"
        ) from error
    asked = Counter[str]()
    failed: dict[str, list[float]] = {}
    for launch in status.pending_launches:
        asked[launch.ray_node_type_name] += launch.count
    for launch in status.failed_launches:
        failed.setdefault(launch.ray_node_type_name, []).append(launch.failed_ts_s)
    return Launches(asked, Counter(one.ray_node_type_name for one in status.pending_nodes), failed)


def find_refusals(log: str) -> dict[str, str]:
    """The newest reason by node type why none came, from the autoscaler's log."""
    return {found[1]: found[2] for line in log.splitlines() if (found := REFUSAL.search(line))}


def tell_launches(launches: Launches, refusals: Mapping[str, str]) -> Iterator[str]:
    for node_type, count in launches.asked.items():
        yield f"{count} x {node_type} asked for, and not there yet"
    for node_type, count in launches.starting.items():
        yield f"{count} x {node_type} starting"
    for node_type, times in launches.failed.items():
        if node_type not in launches.starting:
            reason = refusals.get(node_type, f"{LOG} of the head may say why")[:MAX_WORDS]
            last = datetime.fromtimestamp(max(times), UTC)
            yield f"no {node_type} came, the last time at {last:%H:%M:%S} UTC: {reason}"
