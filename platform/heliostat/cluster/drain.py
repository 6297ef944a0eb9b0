"""Draining a node of Ray: what runs there moves away or ends well, and nothing new is placed."""

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from heliostat.errors import HeliostatError

ANSWER_SECONDS = 10.0
SHOWN_ID = 12
MIN_ID = 4


@dataclass(frozen=True)
class Node:
    """A living node; `is_here` says that its raylet runs on this machine, `instance` is what its
    cloud calls the machine, if an autoscaler brought it.
    """

    id: str
    address: str
    is_head: bool = False
    is_here: bool = False
    instance: str = ""

    def __str__(self) -> str:
        return f"{self.id[:SHOWN_ID]} ({self.address}{', the head' if self.is_head else ''})"


def choose_node(nodes: Sequence[Node], wanted: str | None) -> Node:
    """The node whose address, whose instance or the first digits of whose id are `wanted`; None:
    the one of this machine.

    Raises:
        HeliostatError: there is no such node, or there are several.
    """

    def fits(node: Node) -> bool:
        if wanted is None:
            return node.is_here
        begins = len(wanted) >= MIN_ID and node.id.startswith(wanted.lower())
        return begins or wanted in {node.address, node.instance} - {""}

    found = [node for node in nodes if fits(node)]
    if len(found) == 1:
        return found[0]
    what = "on this machine" if wanted is None else f"that {wanted!r:.80} names"
    listed = ", ".join(map(str, found or nodes))
    raise HeliostatError(
        f"there {'are several nodes' if found else 'is no living node'} of Ray {what}: give the "
        f"address of one or the first digits of its id, of {listed or 'none'}"
    )


def find_cluster(address: str | None) -> str:
    """HOST:PORT of Ray's control store: as given, of RAY_ADDRESS, or of the Ray of this machine.

    Raises:
        HeliostatError: no Ray is known, or nobody listens there.
    """
    from ray._private.services import canonicalize_bootstrap_address_or_die

    try:
        found: str = canonicalize_bootstrap_address_or_die(address)
    except (ConnectionError, ValueError) as error:
        raise HeliostatError(
            f"no cluster is known here ({' '.join(str(error).split())[:200]}): give --address"
        ) from error
    host, _, port = found.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except OSError as error:
        raise HeliostatError(f"Ray does not answer at {found} ({error}): is it up?") from error
    return found


@contextmanager
def _told() -> Iterator[None]:
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:  # nobody answers in time, or it does not let us in
        first, *_ = f"{error}\n".splitlines()
        raise HeliostatError(
            f"Ray's control store does not answer or lets nobody in ({first[:200]}): check that it "
            "is up and that RAY_AUTH_TOKEN_PATH is the cluster's token"
        ) from error


class Drainer:
    """The control store of a Ray, as far as it drains. Each method raises HeliostatError if it does
    not answer or lets nobody in.
    """

    def __init__(self, cluster: str) -> None:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        with _told():
            self._gcs = GcsClient(address=cluster)

    def list_nodes(self) -> list[Node]:
        """Those that live."""
        from ray._private.services import find_node_ids
        from ray.core.generated.gcs_pb2 import GcsNodeInfo

        here = find_node_ids()
        with _told():
            found = self._gcs.get_all_node_info(
                timeout=ANSWER_SECONDS, state_filter=GcsNodeInfo.GcsNodeState.ALIVE
            )
        return [
            Node(
                id.hex(),
                info.node_manager_address,
                info.is_head_node,
                id.hex() in here,
                info.instance_id,
            )
            for id, info in found.items()
        ]

    def drain(self, node: Node, reason: str, seconds: int | None) -> None:
        """Tell Ray that `node` goes after `seconds`, None: some time. Said again it changes that.

        Raises:
            HeliostatError: Ray refuses.
        """
        from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

        deadline_ms = 0 if seconds is None else round((time.time() + seconds) * 1000)
        with _told():
            accepted, why = self._gcs.drain_node(
                node.id, DRAIN_NODE_REASON_PREEMPTION, reason, deadline_ms
            )
        if not accepted:
            raise HeliostatError(f"Ray refuses to drain node {node}: {why or 'without a reason'}")
