"""Nodes of AWS for Ray's launcher: on spot where it says so, and on demand while there is none."""

from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

from heliostat.pauses import Pauses

MARKET = "InstanceMarketOptions"
# What EC2 calls it that there is no spot capacity to be had, or no more of it for this account.
SHORTAGES = frozenset(
    {
        "InsufficientInstanceCapacity",
        "MaxSpotInstanceCountExceeded",
        "SpotMaxPriceTooLow",
        "UnfulfillableCapacity",
    }
)


class Nodes(AWSNodeProvider):  # type: ignore[misc]
    """Ray's own nodes of AWS, but that a spot node which cannot be had comes on demand.

    Ray's autoscaler turns to another node type only when a machine came and did not join. Where
    EC2 refuses to launch one it asks for the same type again, for as long as there is no capacity.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._pauses = Pauses()

    def create_node(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int
    ) -> dict[str, Any]:
        with self._pauses.keep(tags.get(TAG_RAY_USER_NODE_TYPE, "")):
            return self._create(node_config, tags, count)

    def _create(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int
    ) -> dict[str, Any]:
        try:
            created: dict[str, Any] = super().create_node(node_config, tags, count)
        except NodeLaunchException as error:
            if MARKET not in node_config or error.category not in SHORTAGES:
                raise
            print(f"no spot capacity ({error.category}): {count} on demand", flush=True)
            on_demand = {key: value for key, value in node_config.items() if key != MARKET}
            created = super().create_node(on_demand, tags, count)
        return created
