"""Of nodes that do not come is said why, once, however often they were asked for."""

from heliostat.submission.launches import Launches, find_refusals, tell_launches

LOG = """
2026-11-23 13:14:01,250 INFO node_provider.py:492 -- Failed to launch 1 nodes of type training: Old
2026-11-23 13:14:02,250 INFO node_provider.py:489 -- Launched 1 nodes of type data.
2026-11-23 13:14:03,250 INFO node_provider.py:492 -- Failed to launch 2 nodes of type training: Node
2026-11-23 13:14:04,250 INFO node_provider.py:492 -- Failed to launch 1 nodes of type big: Quota: 8
"""


def test_the_newest_reason_of_each_type_counts() -> None:
    assert find_refusals(LOG) == {"training": "Node", "big": "Quota: 8"}


def test_many_failures_of_a_type_are_one_sentence_with_the_last_time() -> None:
    launches = Launches({"training": 2}, {"data": 1}, {"training": [0.0, 7.0, 3.0], "big": [60.0]})
    assert list(tell_launches(launches, {"training": "Insufficient"})) == [
        "2 x training asked for, and not there yet",
        "1 x data starting",
        "no training came, the last time at 00:00:07 UTC: Insufficient",
        "no big came, the last time at 00:01:00 UTC: monitor.log of the head may say why",
    ]


def test_what_starts_now_has_not_failed() -> None:
    assert list(tell_launches(Launches({}, {"gpu": 1}, {"gpu": [1.0]}), {})) == ["1 x gpu starting"]
