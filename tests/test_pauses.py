"""A cloud without machines is not asked in a tight loop, and is asked again."""

from contextlib import suppress
from dataclasses import dataclass

from heliostat.pauses import FIRST_SECONDS, MOST_SECONDS, Pauses


class Refused(Exception):
    pass


@dataclass
class Cloud:
    """Counts who asks; the clock is its own."""

    has_machines: bool = False
    asked: int = 0
    now: float = 0.0

    def __post_init__(self) -> None:
        self.pauses = Pauses(lambda: self.now)

    def launch(self, node_type: str = "gpu") -> bool:
        with suppress(Refused), self.pauses.keep(node_type):
            self.asked += 1
            if not self.has_machines:
                raise Refused
            return True
        return False


def test_of_an_hour_of_asking_every_second_the_cloud_hears_little() -> None:
    cloud = Cloud()
    for second in range(3600):
        cloud.now = float(second)
        assert not cloud.launch()
    assert 3600 / MOST_SECONDS <= cloud.asked <= 3600 / MOST_SECONDS + 5


def test_what_comes_back_is_had_within_the_longest_pause_and_the_next_pause_is_short() -> None:
    cloud = Cloud()
    for second in range(3600):
        cloud.now = float(second)
        cloud.launch()
    cloud.has_machines = True
    cloud.now += MOST_SECONDS
    assert cloud.launch()
    cloud.has_machines = False
    assert not cloud.launch()
    cloud.has_machines = True
    cloud.now += FIRST_SECONDS
    assert cloud.launch()


def test_a_pause_is_of_one_type() -> None:
    cloud = Cloud()
    assert not cloud.launch()
    cloud.has_machines = True
    assert not cloud.launch()
    assert cloud.launch("cpu")
