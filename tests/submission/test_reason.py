"""Why a job is where it is: one sentence for each situation, by the name of what holds it up."""

import pytest

from heliostat.submission.fit import Kind
from heliostat.submission.reason import Holder, Request, Situation, explain, is_waiting

KINDS = (Kind("head", {"CPU": 4.0}, 1),)
HOLDERS = (Holder("job big", {"CPU": 3.0}),)
WORKERS = Request("a group of workers", ({"CPU": 1.0}, {"CPU": 1.0}))
GPUS = Request("a group of workers", ({"CPU": 1.0, "GPU": 8.0},))
LICENCE = Request("its program", ({"licence": 1.0, "CPU": 2.0},))
STEP = "\x1b[36m(RayTrainWorker pid=1)\x1b[0m step 1,200/4,000  epoch 3  loss 1  wait {}%  MFU 3%"


@pytest.mark.parametrize(
    ("situation", "told", "waits"),
    [
        (Situation("SUCCEEDED"), "it has ended: SUCCEEDED", False),
        (Situation("FAILED", lines=("x", "error: no room")), "FAILED (error: no room)", False),
        (Situation("PENDING"), "Ray has not begun", True),
        (Situation("PENDING", supervisor="PENDING_CREATION"), "being set up", True),
        (
            Situation("PENDING", supervisor="PENDING_CREATION", kinds=KINDS, holders=HOLDERS,
                      requests=(Request("its program", ({"CPU": 2.0},)),)),
            "its program needs 1 x 2 CPU: it waits until that is free; 1 CPU left, job big has 3",
            True,
        ),
        (
            Situation("RUNNING", supervisor="ALIVE",
                      lines=("its turn: 2 workers", "in the queue: b saves", "noise")),
            "it waits in the queue: b saves",
            True,
        ),
        (
            Situation("RUNNING", supervisor="ALIVE",
                      lines=("in the queue: b saves", "its turn: 2 workers", STEP.format(9))),
            "it trains: step 1,200",
            False,
        ),
        (
            Situation("RUNNING", supervisor="ALIVE",
                      lines=(STEP.format(9), "in the queue: b saves", "its turn: 2 workers")),
            "its turn has come: 2 workers start",
            False,
        ),
        (
            Situation("RUNNING", "", "ALIVE", (WORKERS,), KINDS, HOLDERS),
            "a group of workers needs 2 x 1 CPU: it waits until that is free; "
            "1 CPU left, job big has 3 CPU",
            True,
        ),
        (
            Situation("RUNNING", "", "ALIVE", (GPUS,), KINDS, HOLDERS),
            "no node of this cluster can have 1 CPU and 8 GPU: it will never start",
            True,
        ),
        (
            Situation("PENDING", "", "PENDING_CREATION", (LICENCE,), KINDS, HOLDERS),
            "its program needs 1 x 2 CPU and 1 licence, and no node of this cluster can have 2 CPU "
            "and 1 licence: it will never start",
            True,
        ),
        (
            Situation("RUNNING", "", "ALIVE", (GPUS,), KINDS, HOLDERS, may_grow=True),
            "it waits for a node that has that",
            True,
        ),
        (Situation("RUNNING", supervisor="gone"), "what runs its program is gone", False),
        (
            Situation("RUNNING", supervisor="ALIVE", lines=(STEP.format(9), "noise")),
            "it trains: step 1,200 of 4,000",
            False,
        ),
        (
            Situation("RUNNING", supervisor="ALIVE", lines=(STEP.format(91),)),
            "step 1,200 of 4,000, and waits 91% of its time for data",
            False,
        ),
        (
            Situation("RUNNING", supervisor="ALIVE", lines=("run r: 90 steps of 4 rows, x",)),
            "the workers of run r start: no step of 90",
            False,
        ),
        (Situation("RUNNING", supervisor="ALIVE"), "it runs, and said nothing", False),
    ],
)  # fmt: skip
def test_a_situation_is_told_by_name(situation: Situation, told: str, waits: bool) -> None:
    assert told in explain(situation)[0]
    assert is_waiting(situation) == waits


def test_what_the_autoscaler_says_is_told_as_well() -> None:
    said = "1 x gpu did not come: InsufficientInstanceCapacity"
    situation = Situation("RUNNING", "", "ALIVE", (GPUS,), KINDS, may_grow=True, launches=(said,))
    assert explain(situation)[1] == said
