"""Which restarts of a run's workers count as failures."""

from heliostat.storage import connect
from heliostat.train.failures import count_start, excuse, read_tally

KEY = "runs/r/failures/try"


def test_what_follows_a_first_start_a_notice_or_growth_is_no_failure(tmp_path: object) -> None:
    store = connect(str(tmp_path))
    told = []
    for workers, excused in [(2, False), (2, True), (1, False), (2, False), (1, False), (1, False)]:
        told.append(count_start(store, KEY, workers).failures)
        if excused:
            excuse(store, KEY)
    # The first; after a kill; after a notice; grown; a node lost; a kill.
    assert told == [0, 1, 1, 1, 2, 3]
    assert read_tally(store, KEY).workers == 1
