"""The train section: who trains, on how much, with which optimiser, until when."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from heliostat.spec.section import (
    Fraction,
    Natural,
    NaturalFloat,
    Positive,
    PositiveFloat,
    Section,
    Seed,
    refuse_other_names,
)

# As Ray writes it, in full: a label selector takes no less.
NodeId = Annotated[str, Field(pattern=r"^[0-9a-f]{56}$")]
Beta = Annotated[float, Field(ge=0, lt=1, strict=True)]
READERS = {
    "momentum": ("sgd", "rmsprop"),
    "nesterov": ("sgd",),
    "betas": ("adam", "adamw"),
    "alpha": ("rmsprop",),
}


class OptimizerSpec(Section):
    """`decay: matrices` spares biases, norms and embeddings of one dimension the weight decay."""

    kind: Literal["sgd", "rmsprop", "adam", "adamw"] = "adam"
    lr: PositiveFloat = 1e-3
    momentum: Fraction = 0.0
    nesterov: bool = False
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    alpha: Beta = 0.99
    eps: PositiveFloat = 1e-8
    weight_decay: NaturalFloat = 0.0
    decay: Literal["all", "matrices"] = "all"

    @model_validator(mode="after")
    def _every_key_is_read(self) -> Self:
        for key, kinds in READERS.items():
            if getattr(self, key) != type(self).model_fields[key].default and (
                self.kind not in kinds
            ):
                owners = " and ".join(kinds)
                raise ValueError(f"{key} belongs to {owners}, {self.kind} does not read it")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum")
        return self


class ScheduleSpec(Section):
    """The learning rate as a share of `optimizer.lr`.

    All kinds first rise linearly over `warmup_steps`. Then `step` multiplies by `factor` every
    `every` steps; `linear` and `cosine` fall to `final` at the last step; `wsd` stays and falls
    linearly over the last `decay_steps`; `plateau` multiplies by `factor` when `patience`
    validations in a row did not improve.
    """

    kind: Literal["constant", "step", "linear", "cosine", "wsd", "plateau"] = "constant"
    warmup_steps: Natural = 0
    every: Positive = 1000
    factor: Annotated[float, Field(gt=0, lt=1, strict=True)] = 0.1
    final: Fraction = 0.0
    decay_steps: Positive = 1000
    patience: Positive = 3


class StopSpec(Section):
    """What ends a run before its last step; the metrics are those of the validation split.

    `patience` is of `metric`, or of the loss where none is named.
    """

    tokens: Positive | None = None
    metric: str | None = None
    target: float | None = None
    patience: Positive | None = None
    min_delta: NaturalFloat = 0.0
    seconds: PositiveFloat | None = None

    @model_validator(mode="after")
    def _a_metric_is_watched_for_something(self) -> Self:
        if self.target is not None and self.metric is None:
            raise ValueError("target is of a metric: set metric")
        if self.metric is not None and self.target is None and self.patience is None:
            raise ValueError("metric alone ends nothing: set target or patience")
        return self


class TrainSpec(Section):
    """`force` lets a run go on under a changed spec. `workers` may be a range [fewest, most]: the
    run then shrinks and grows with the cluster.

    `global_batch` is the rows of one optimiser step over all workers; `micro_batch` the rows that
    one worker has in flight, `auto` finds the largest that fits, None takes its whole share. A
    worker that makes no step for `hang_seconds` says where it stands and is restarted.

    Rows that take no more than `cache_share` of the cluster's object store are read once and stay
    there; with 0 every epoch reads the bucket.

    `checkpoint_steps: auto` saves as often as pays, by what the last checkpoint cost and how often
    the run failed.

    Every `validate_steps` the run waits for a validation, which steers it and ranks checkpoints;
    with `validate_async` it goes on, and its checkpoints are scored beside it.

    With `preflight` the nodes are asked first what is wrong with them; on those of `avoid_nodes`,
    by their ids, no worker is started.
    """

    run: str | None = None
    force: bool = False
    workers: Positive | tuple[Positive, Positive] = 1
    cpus_per_worker: Positive = 1
    gpus_per_worker: Natural = 0
    epochs: Positive = 10
    steps: Positive | None = None
    global_batch: Positive = 64
    micro_batch: Positive | Literal["auto"] | None = None
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    clip_norm: PositiveFloat | None = None
    ema: Annotated[float, Field(gt=0, lt=1, strict=True)] | None = None
    stop: StopSpec = StopSpec()
    validate_steps: Positive | None = None
    validate_async: bool = False
    strategy: Literal["ddp", "fsdp"] = "ddp"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    recompute: bool = False
    compile: bool = False
    seed: Seed = 0
    cache_share: Annotated[float, Field(ge=0, le=0.5, strict=True)] = 0.25
    checkpoint_steps: Positive | Literal["auto"] = "auto"
    keep_checkpoints: Annotated[int, Field(ge=2, strict=True)] = 2
    max_failures: Natural = 3
    hang_seconds: PositiveFloat = 600
    preflight: bool = False
    avoid_nodes: tuple[NodeId, ...] = ()

    @property
    def fewest_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @model_validator(mode="after")
    def _workers_are_a_range(self) -> Self:
        if self.fewest_workers > self.most_workers:
            raise ValueError("workers must be [fewest, most]")
        return self

    @model_validator(mode="after")
    def _every_worker_gets_rows(self) -> Self:
        if self.global_batch < self.most_workers:
            raise ValueError(
                f"global_batch {self.global_batch} leaves workers without rows, "
                f"it must be at least workers ({self.most_workers})"
            )
        return self

    @model_validator(mode="after")
    def _validation_has_its_steps(self) -> Self:
        reads = self.schedule.kind == "plateau" or self.stop.metric or self.stop.patience
        if reads and not self.validate_steps:
            raise ValueError(
                "schedule plateau, stop.metric and stop.patience read a validation: "
                "set validate_steps"
            )
        if self.validate_steps and self.validate_async:
            raise ValueError(
                "give validate_steps, for a validation that steers the run, or validate_async, for "
                "one that ranks its checkpoints, not both"
            )
        return self

    @field_validator("run")
    @classmethod
    def _run_is_a_name(cls, run: str | None) -> str | None:
        return refuse_other_names(run) if run is not None else None
