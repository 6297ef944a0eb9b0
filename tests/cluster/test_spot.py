"""From a notice to a drained node: the decision, the watch, its process, and a node that drains."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.cluster.drain import Node, choose_node
from heliostat.cluster.notice import Notice, Unheard
from heliostat.cluster.spot import (
    GRACE_SECONDS,
    REMIND_SECONDS,
    Drain,
    Past,
    Refused,
    Status,
    Stays,
    Watch,
    decide,
)
from heliostat.errors import HeliostatError

Wait = Callable[..., None]

END = Notice("it ends", 1000.0)
FEAR = Notice("it may end", None)
LATER = Notice("it ends", 2000.0)


@pytest.mark.parametrize(
    ("status", "now", "decision"),
    [
        (Status(), 0, None),
        (Status(END), 880, Drain("it ends", 120)),
        (Status(END), 999.9, Drain("it ends", 1)),
        (Status(END), 1000 + GRACE_SECONDS, Drain("it ends", 1)),
        (Status(END), 1001 + GRACE_SECONDS, Past()),
        (Status(FEAR), 880, None),
        (Status(END, drained=END), 890, None),
        (Status(LATER, drained=END), 1500, Drain("it ends", 500)),
        (Status(END, drained=FEAR), 880, Drain("it ends", 120)),
        (Status(END, drained=END), 1000 + GRACE_SECONDS, None),
        (Status(END, drained=END), 1001 + GRACE_SECONDS, Stays(1000)),
        (Status(None, drained=END, withdrawn=890), 890 + GRACE_SECONDS, None),
        (Status(None, drained=END, withdrawn=890), 891 + GRACE_SECONDS, Stays(890)),
        (Status(None, drained=FEAR, withdrawn=890), 951, Stays(890)),
        (Status(FEAR, drained=FEAR), 10**9, None),
    ],
)
def test_what_is_done_about_what_is_said(status: Status, now: float, decision: object) -> None:
    assert decide(status, now) == decision


def test_advice_is_heeded_if_asked_for() -> None:
    assert decide(Status(FEAR), 0, heeds_advice=True) == Drain("it may end", None)
    assert decide(Status(FEAR, drained=FEAR), 0, heeds_advice=True) is None


class Scene:
    """A watch of a source that says what it is told to, at a time that it is told."""

    name = "the scene"
    poll_seconds = 5.0

    def __init__(self, heeds_advice: bool = False) -> None:
        self.says: Notice | Exception | None = None
        self.refuses = ""
        self.now = 0.0
        self.drained: list[tuple[float, Drain]] = []
        self.lines: list[str] = []
        self.watch = Watch(self, self._drain, self.lines.append, heeds_advice, lambda: self.now)

    def listen(self) -> Notice | None:
        if isinstance(self.says, Exception):
            raise self.says
        return self.says

    def look_until(self, then: float) -> None:
        while self.now < then:
            self.now += self.poll_seconds
            self.watch.look()

    def _drain(self, order: Drain) -> str:
        if self.refuses:
            raise Refused(self.refuses)
        self.drained.append((self.now, order))
        return "node 1 drains"


@given(st.lists(st.sampled_from([None, END, LATER, FEAR, Unheard("500"), Unheard("away")])))
def test_a_notice_drains_once_whatever_comes_between(said: list[Any]) -> None:
    scene = Scene()
    for scene.says in said:
        scene.look_until(scene.now + scene.poll_seconds)
    runs = [one for one in said if one in (END, LATER)]
    changes = len(runs[:1]) + sum(a != b for a, b in pairwise(runs))
    assert len(scene.drained) == changes


def test_what_is_wrong_with_the_source_is_said_once_and_withdraws_nothing() -> None:
    scene = Scene()
    scene.says = Unheard("500")
    scene.look_until(500)
    scene.says = Unheard("timed out")
    scene.look_until(600)
    scene.says = END
    scene.look_until(700)
    scene.says = Unheard("timed out")
    scene.look_until(1000)
    assert len(scene.drained) == 1
    assert [line.split(":")[0] for line in scene.lines] == [
        *("it is not heard", "it is not heard", "it is heard again"),
        *("notice", "node 1 drains; it took 0.0 s", "it is not heard"),
    ]


def test_a_drain_is_tried_until_the_end_and_its_reason_is_said_once() -> None:
    scene = Scene()
    scene.says, scene.refuses = END, "Ray is away"
    scene.look_until(500)
    assert scene.lines[1:] == ["not drained, trying again: Ray is away"]
    scene.refuses = "Ray refuses"
    scene.look_until(600)
    scene.refuses = ""
    scene.look_until(700)
    ((at, order),) = scene.drained
    assert order.seconds == END.at - at if END.at else False
    assert scene.lines[2:] == [
        "not drained, trying again: Ray refuses",
        "node 1 drains; it took 0.0 s",
    ]


def test_a_drain_that_never_works_ends_with_the_machine() -> None:
    scene = Scene()
    scene.says, scene.refuses = END, "Ray is away"
    scene.look_until(2000)
    scene.refuses = ""
    scene.look_until(3000)
    assert scene.drained == []
    assert scene.lines[-1] == "the end that it names is past: nothing is drained"


@pytest.mark.parametrize("withdrawn", [False, True])
def test_a_machine_that_stays_after_its_end_is_told_of_again_and_again(withdrawn: bool) -> None:
    scene = Scene()
    scene.says = END
    scene.look_until(500)
    scene.says = None if withdrawn else END
    scene.look_until(1000 + GRACE_SECONDS + 3 * REMIND_SECONDS)
    warnings = [line for line in scene.lines if line.startswith("WARNING: this machine stays")]
    assert len(warnings) >= 3
    assert ("the notice is withdrawn" in scene.lines) == withdrawn
    scene.says = Notice("it ends", scene.now + 100)
    scene.look_until(scene.now + 50)
    assert len(scene.drained) == 2


NODES = (Node("aaaa11", "10.0.0.1", is_head=True), Node("aaaa22", "10.0.0.2", is_here=True))


def test_a_node_is_named_by_its_address_its_id_or_by_being_here() -> None:
    assert choose_node(NODES, None) == choose_node(NODES, "10.0.0.2") == NODES[1]
    assert choose_node(NODES, "AAAA2") == NODES[1]


@pytest.mark.parametrize("wanted", ["aaaa", "aaa", "bbbb", "10.0.0", ""])
def test_what_names_no_node_or_several_is_refused(wanted: str) -> None:
    with pytest.raises(HeliostatError, match=r"aaaa11 \(10.0.0.1, the head\)"):
        choose_node(NODES, wanted)
    with pytest.raises(HeliostatError, match="no living node of Ray on this machine"):
        choose_node(NODES[:1], None)
