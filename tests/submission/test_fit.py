"""What can never run is refused with the numbers; what a larger cluster could is not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.errors import HeliostatError
from heliostat.submission.fit import Kind, Need, check_fit
from heliostat.submission.jobs import read_kinds

HEAD = Kind("head", {"CPU": 4.0}, 1)
GPU = Kind("gpu", {"CPU": 8.0, "GPU": 2.0}, 3)


@pytest.mark.parametrize(
    ("need", "told"),
    [
        (Need("a worker", {"CPU": 1, "GPU": 8}), r"needs 1 CPU and 8 GPU.*3 x gpu with 8 CPU"),
        (Need("a worker", {"CPU": 16}), r"no node of this cluster can have that"),
        (Need("a worker", {"GPU": 2}, 4), r"4 times a worker.*room for 3 at most"),
        (Need("a worker", {"CPU": 4}, 7, 1), r"make 29 CPU, and this cluster has 28 at most"),
    ],
)
def test_what_never_fits_is_refused_with_the_numbers(need: Need, told: str) -> None:
    with pytest.raises(HeliostatError, match=told):
        check_fit(need, [HEAD, GPU])


@given(st.integers(1, 8), st.integers(0, 2), st.integers(1, 40))
def test_what_is_let_pass_fits_an_empty_cluster(cpus: int, gpus: int, count: int) -> None:
    places = 0
    for kind in [HEAD, GPU]:
        for _ in range(kind.most):
            left = dict(kind.resources)
            while left.get("CPU", 0) >= cpus and left.get("GPU", 0) >= gpus:
                left = {"CPU": left["CPU"] - cpus, "GPU": left.get("GPU", 0) - gpus}
                places += 1
    need = Need("a worker", {"CPU": cpus, "GPU": gpus}, count)
    if places >= count:
        check_fit(need, [HEAD, GPU])
    else:
        with pytest.raises(HeliostatError):
            check_fit(need, [HEAD, GPU])


def test_the_kinds_of_the_checkout_are_read_as_ray_up_takes_them(
    pytestconfig: pytest.Config,
) -> None:
    kinds, are_all = read_kinds(pytestconfig.rootpath / "cluster.yaml")
    assert are_all
    assert {kind.name for kind in kinds if kind.resources.get("GPU")} == {"training"}
    check_fit(Need("a worker", {"CPU": 2, "GPU": 1}, 4), kinds)
    with pytest.raises(HeliostatError, match="room for 4 at most"):
        check_fit(Need("a worker", {"CPU": 2, "GPU": 1}, 5), kinds)
