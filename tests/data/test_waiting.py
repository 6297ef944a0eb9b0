"""Before a pipeline waits for CPUs it says so, and only then."""

from collections.abc import Callable

import pytest

from heliostat.data.waiting import say_if_waiting


@pytest.mark.cluster
def test_a_wait_is_said_with_its_numbers(
    cluster: object, wait_until: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    say_if_waiting(cpus=0)  # connects to the cluster if nobody has
    total = int(ray.cluster_resources()["CPU"])
    wait_until(lambda: ray.available_resources().get("CPU") == total)
    say_if_waiting(cpus=total)
    assert capsys.readouterr().out == ""

    class Busy:
        pass

    busy = ray.remote(Busy).options(num_cpus=total).remote()
    try:
        wait_until(lambda: "CPU" not in ray.available_resources())
        say_if_waiting(cpus=1)
    finally:
        ray.kill(busy)
    said = capsys.readouterr().out
    assert f"waiting for CPUs: 0 of {total} are free, needed: 1;" in said
