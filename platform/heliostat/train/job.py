"""What the driver of a run and its workers share: what a worker is told, and keys in the bucket."""

from dataclasses import dataclass

from heliostat.spec import RunSpec


@dataclass(frozen=True)
class Job:
    """What every worker of a run is told; `submission` names the try that they belong to.

    `weights` is the digest of those at `model.init`, for the driver and its workers may be on
    machines with other directories.
    """

    spec: RunSpec
    data_name: str
    data_version: str
    run: str
    steps: int
    submission: str
    weights: str | None = None

    @property
    def reader(self) -> str:
        """The name of the actor that hands out the rows."""
        return f"{self.run}-{self.submission}"


@dataclass(frozen=True)
class Ended:
    """What a run leaves at its end, as JSON; `checkpoint` is the one to take the weights from.

    `reason` is why it stopped before its last step; `memory_bytes`, at the peak, and `step_seconds`
    are of the first worker, 0 where it made no step.
    """

    step: int
    reason: str | None
    checkpoint: str | None
    metrics: dict[str, float]
    parameters: int = 0
    memory_bytes: int = 0
    step_seconds: float = 0.0
    hours: float = 0.0


class Preempted(Exception):
    """The run is saved up to this step, because a node of its workers will be taken away, or
    others need their room."""


def result_key(run: str) -> str:
    return f"runs/{run}/result.json"


def failure_key(job: Job) -> str:
    """Where what a retry cannot mend is written down; of this try alone, as others may go on."""
    return f"runs/{job.run}/failures/{job.submission}.txt"
