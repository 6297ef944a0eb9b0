"""How far a check goes and what it lets pass, as keys that a user may set."""

from typing import Annotated, Self

from pydantic import Field, StrictBool, model_validator

from heliostat.hardware import MACHINES
from heliostat.spec.section import NaturalFloat, Positive, PositiveFloat, Section


class Limits(Section):
    """`quick` leaves out the rates of pairs; `pairs` is how many of them are measured at most.

    A node has `answer_seconds` for each question. `clock_seconds` is how far its clock may be off;
    `disk_gib` and `memory_gib` are what must be free. What reaches less than `slow_share` of what
    most reach is slow. `machine` is a row of the table of hardware that the nodes are of, whose
    network they are then held to.
    """

    quick: StrictBool = False
    pairs: Positive = 128
    answer_seconds: PositiveFloat = 20
    clock_seconds: PositiveFloat = 1
    disk_gib: NaturalFloat = 5
    memory_gib: NaturalFloat = 0.5
    slow_share: Annotated[float, Field(gt=0, lt=1, strict=True)] = 0.4
    machine: str = ""

    @model_validator(mode="after")
    def _machine_is_known(self) -> Self:
        known = [machine.name for machine in MACHINES]
        if self.machine and self.machine not in known:
            raise ValueError(f"machine must be one of {', '.join(known)}")
        return self
