"""A raylet that joins the cluster of this machine; its process id is the last word printed.

`ray start --address` refuses a cluster that talks on 127.0.0.1 alone.
"""

import json
import sys

from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.ray_constants import PROCESS_TYPE_RAYLET

OBJECT_STORE_BYTES = 256 << 20


def main(gcs_address: str, directory: str, resources: str) -> None:
    declared = json.loads(resources)
    parameters = RayParams(
        gcs_address=gcs_address,
        node_ip_address="127.0.0.1",
        num_cpus=declared.pop("CPU", 0),
        num_gpus=declared.pop("GPU", 0),
        resources=declared,
        object_store_memory=OBJECT_STORE_BYTES,
        min_worker_port=0,
        max_worker_port=0,
        dashboard_agent_listen_port=0,
        temp_dir=directory,
    )
    node = Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)
    (raylet,) = node.all_processes[PROCESS_TYPE_RAYLET]
    print(raylet.process.pid)


if __name__ == "__main__":
    main(*sys.argv[1:])
