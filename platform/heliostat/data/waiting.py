"""A word for the user before a pipeline waits: Ray itself waits for CPUs in silence."""

import ray


def say_if_waiting(cpus: int) -> None:
    """Print how many CPUs are free if they are fewer than the `cpus` that something needs to run.

    Others may hold them, as the replicas of served models do for as long as they are served.
    """
    if not ray.is_initialized():
        ray.init()
    free = ray.available_resources().get("CPU", 0)
    if free < cpus:
        print(
            f"waiting for CPUs: {free:g} of {ray.cluster_resources().get('CPU', 0):g} are free, "
            f"needed: {cpus}; `serve status` and `ray job list` show who has the others",
            flush=True,
        )
