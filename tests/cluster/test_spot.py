"""From a notice to a drained node: the decision, the watch, its process, and a node that drains."""

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from heliostat import cli
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
from heliostat.local import Cluster, processes
from metadata import Metadata, serve_metadata
from watching import Agent, list_draining, run_watch

Wait = Callable[..., None]

END = Notice("it ends", 1000.0)
FEAR = Notice("it may end", None)
LATER = Notice("it ends", 2000.0)


@pytest.mark.parametrize(
    ("status", "now", "decision"),
    [
        (Status(), 0, None),
        (Status(END), 880, Drain("it ends", 120)),
        (Status(END), 939, Drain("it ends", 61)),
        (Status(END), 940, Drain("it ends", None)),
        (Status(END), 1000 + GRACE_SECONDS, Drain("it ends", None)),
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

    def count_warnings() -> int:
        return sum(line.startswith("WARNING: this machine stays") for line in scene.lines)

    scene.look_until(510 + GRACE_SECONDS)
    assert count_warnings() == int(withdrawn)
    scene.look_until(1000 + GRACE_SECONDS + 3 * REMIND_SECONDS)
    assert 3 <= count_warnings() <= 5
    assert ("the notice is withdrawn" in scene.lines) == withdrawn
    scene.says = Notice("it ends", scene.now + 100)
    scene.look_until(scene.now + 50)
    assert len(scene.drained) == 2


NODES = (Node("aaaa11", "10.0.0.1", is_head=True), Node("aaaa22", "10.0.0.2", is_here=True))


def test_a_node_is_named_by_its_address_its_id_or_by_being_here() -> None:
    assert choose_node(NODES, None) == choose_node(NODES, "10.0.0.2") == NODES[1]
    assert choose_node(NODES, "AAAA2") == NODES[1]
    brought = Node("bbbb33", "10.0.0.2", instance="training-1")
    assert choose_node([*NODES, brought], "training-1") == brought


@pytest.mark.parametrize("wanted", ["aaaa", "aaa", "bbbb", "10.0.0", ""])
def test_what_names_no_node_or_several_is_refused(wanted: str) -> None:
    with pytest.raises(HeliostatError, match=r"aaaa11 \(10.0.0.1, the head\)"):
        choose_node(NODES, wanted)
    with pytest.raises(HeliostatError, match="no living node of Ray on this machine"):
        choose_node(NODES[:1], None)
    with pytest.raises(HeliostatError, match="no living node of Ray that ''"):
        choose_node(NODES[:1], "")


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_a_watch_tries_while_ray_is_away_and_sigterm_ends_it(
    tmp_path: Path, nowhere: str, wait_until: Wait
) -> None:
    options = ["--source", f"file:{tmp_path}/leaving", "--address", nowhere]
    with run_watch(tmp_path, *options) as agent:
        wait_until(lambda: agent.count("watching the file"), 60)
        assert "not known yet: Ray does not answer at" in agent.lines[0]
        (tmp_path / "leaving").write_text('{"seconds": 600}')
        wait_until(lambda: agent.count("not drained, trying again: Ray does not answer"), 60)
        agent.process.terminate()
        assert agent.process.wait(5) == 128 + signal.SIGTERM
    assert agent.lines[-1] == "this watch is ended by SIGTERM"
    assert agent.count("notice: this machine goes at ") == 1


def test_the_newest_watch_of_a_machine_goes_on(
    tmp_path: Path, nowhere: str, wait_until: Wait
) -> None:
    options = ["--source", f"file:{tmp_path}/leaving", "--address", nowhere]
    with run_watch(tmp_path, *options) as first:
        wait_until(lambda: first.lines, 60)
        with run_watch(tmp_path, *options) as second:
            assert first.process.wait(60) == 0
            assert first.lines[-1] == "a newer watch of this machine has begun: this one ends"
            wait_until(lambda: second.lines, 60)
            assert second.process.poll() is None


@pytest.mark.cluster
@pytest.mark.faults
def test_one_notice_of_aws_drains_one_node_once(
    cluster: Cluster, join_node: Callable[..., str], tmp_path: Path, wait_until: Wait
) -> None:
    ray.init(ignore_reinit_error=True, logging_level="ERROR", log_to_driver=False)
    node = join(join_node, wait_until)
    held = occupy(node)
    with serve_metadata({}) as aws, watch_aws(tmp_path, aws, node) as agent:
        wait_until(lambda: agent.count("watching AWS, asked every 5 s, for node"), 60)
        aws.status = 503
        wait_until(lambda: agent.count("it is not heard"), 60)
        aws.status = None
        aws.tokens.clear()
        aws.take_back(120)
        wait_until(lambda: node in list_draining(), 60)
        end_seconds = list_draining()[node] / 1000
        assert abs(end_seconds - aws.end) < 5
        asked = len(aws.asked)
        wait_until(lambda: len(aws.asked) >= asked + 2, 60)
        assert agent.count(f"node {node[:12]} (127.0.0.1) drains and goes in ") == 1
        assert agent.count("it is not heard") == agent.count("it is heard again") == 1
    assert list(list_draining()) == [node]
    ray.kill(held)
    wait_until(lambda: node not in [one["NodeID"] for one in ray.nodes() if one["Alive"]])
    (left,) = [one for one in ray.nodes() if one["NodeID"] == node]
    assert left["DeathReasonMessage"] == "AWS will terminate this machine"


@pytest.mark.cluster
@pytest.mark.faults
def test_ray_that_comes_back_within_the_notice_is_told(
    cluster: Cluster, join_node: Callable[..., str], tmp_path: Path, wait_until: Wait
) -> None:
    ray.init(ignore_reinit_error=True, logging_level="ERROR", log_to_driver=False)
    node = join(join_node, wait_until)
    held = occupy(node)
    leaving = tmp_path / "leaving"
    options = ["--source", f"file:{leaving}", "--node", node]
    (gcs,) = [p for p in processes.find(cluster.state.marker("ray")) if is_gcs(p)]
    with run_watch(tmp_path, *options) as agent:
        wait_until(lambda: agent.count("watching the file"), 60)
        gcs.suspend()
        try:
            leaving.write_text('{"seconds": 600}')
            wait_until(lambda: agent.count("not drained, trying again"), 60)
        finally:
            gcs.resume()
        wait_until(lambda: agent.count("node "), 60)
    assert node in list_draining()
    ray.kill(held)


def test_the_command_refuses_what_it_cannot_drain(
    nowhere: str, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    assert cli.main(["drain", "--address", nowhere]) == 2
    signal.signal(signal.SIGTERM, handler)
    assert f"Ray does not answer at {nowhere}" in capsys.readouterr().err
    for seconds in ("0", "-1", "soon", "1.5", "9" * 10):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["drain", "--seconds", seconds])


def watch_aws(folder: Path, aws: Metadata, node: str) -> AbstractContextManager[Agent]:
    options = ["--source", "aws", "--metadata-url", aws.url, "--node", node]
    return run_watch(folder, *options, http_proxy="http://127.0.0.1:9")


def join(join_node: Callable[..., str], wait_until: Wait) -> str:
    """The id of a new node."""

    def living() -> set[str]:
        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    before = living()
    join_node(1)
    wait_until(lambda: living() - before, 60)
    return (living() - before).pop()


def occupy(node: str) -> Any:
    """An actor on `node`, since a node that drains and has nothing to do ends."""

    class Idler:
        def answer(self) -> bool:
            return True

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    actor = ray.remote(num_cpus=1)(Idler).options(scheduling_strategy=there).remote()
    assert ray.get(actor.answer.remote())
    return actor


def is_gcs(process: psutil.Process) -> bool:
    return bool(process.info["name"] == "gcs_server")
