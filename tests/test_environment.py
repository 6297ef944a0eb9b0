"""The bounds of a machine, and the refusal of a run that leaves no CPU to read data."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.environment import GIB, bound_machine, check_cpus
from heliostat.errors import HeliostatError

CORES = st.integers(1, 256)
MEMORY = st.integers(GIB, 4096 * GIB)


@given(CORES, MEMORY)
def test_bounds_fit_the_machine(cores: int, memory_bytes: int) -> None:
    bounds = bound_machine(cores, memory_bytes)
    assert bounds.logical_cpus >= max(4, cores)
    assert 10 * (bounds.object_store_bytes + bounds.memory_bytes) <= 7 * memory_bytes
    assert bounds.object_store_bytes <= 8 * GIB


@given(CORES, st.integers(1, 64), st.integers(1, 64))
def test_a_run_is_refused_exactly_if_no_cpu_is_left_to_read_data(
    cluster_cpus: int, workers: int, cpus_per_worker: int
) -> None:
    if workers * cpus_per_worker < cluster_cpus:
        check_cpus(cluster_cpus, workers, cpus_per_worker)
    else:
        with pytest.raises(HeliostatError, match=f"of the {cluster_cpus} CPUs"):
            check_cpus(cluster_cpus, workers, cpus_per_worker)


def test_the_refusal_gives_the_numbers_and_the_way_out() -> None:
    with pytest.raises(HeliostatError, match=r"train\.workers=4 x 1 CPU .* at most 3 workers"):
        check_cpus(4, 4, 1)
