"""What the driver of a run and its workers share: what a worker is told, and keys in the bucket."""

from dataclasses import dataclass

from heliostat.spec import RunSpec


@dataclass(frozen=True)
class Job:
    """What every worker of a run is told; `submission` names the try that they belong to."""

    spec: RunSpec
    data_name: str
    data_version: str
    run: str
    steps: int
    submission: str

    @property
    def reader(self) -> str:
        """The name of the actor that hands out the rows."""
        return f"{self.run}-{self.submission}"


class Preempted(Exception):
    """The run is saved up to this step, because a node of its workers will be taken away, or
    others need their room."""


def result_key(run: str) -> str:
    return f"runs/{run}/result.json"


def failure_key(run: str) -> str:
    return f"runs/{run}/failure.txt"
