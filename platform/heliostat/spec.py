"""A run, written down: one YAML file with typed, frozen sections and `section.key=value` overrides."""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from heliostat.errors import HeliostatError

NAME_PATTERN = re.compile(r"[a-z0-9](?:[a-z0-9_-]|\.(?!\.)){0,62}")
NAME_RULE = "1 to 63 of a-z, 0-9, '.', '_' and '-', starting with a letter or digit and without '..'"

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


def check_name(name: str) -> str:
    """Return `name` if it may name a model, a data set, a run or an alias.

    Raises:
        HeliostatError: the name does not follow `NAME_RULE`.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise HeliostatError(f"{name[:80]!r} is not a name: use {NAME_RULE}")
    return name


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SplitSpec(Section):
    """Shares of the rows that are held out; training gets the rest.

    With `test_files`, a glob over keys below `data.source`, the rows of matching files are the test
    split, and the share of validation is taken from the others.
    """

    validation: Fraction = 0.1
    test: Fraction = 0.1
    test_files: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _files_replace_the_share(cls, section: Any) -> Any:
        if isinstance(section, dict) and section.get("test_files"):
            if section.get("test"):
                raise ValueError("give test or test_files, not both")
            return {**section, "test": 0.0}
        return section

    @model_validator(mode="after")
    def _training_gets_rows(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test leave no rows for training")
        return self


class DataSpec(Section):
    source: str
    format: Literal["auto", "images", "idx", "csv", "parquet"] = "auto"
    label: str | None = None
    columns: dict[str, Literal["numeric", "category", "ignore"]] = {}
    max_categories: Positive = 64
    image_size: tuple[Positive, Positive] | None = None
    channels: Literal[1, 3] | None = None
    max_bad_rows: Annotated[int, Field(ge=0)] = 0
    split: SplitSpec = SplitSpec()
    seed: int = 0
    shard_mib: Positive = 64
    rows_per_group: Positive = 1024


class MlpSpec(Section):
    kind: Literal["mlp"]
    hidden: tuple[Positive, ...] = (128, 64)
    dropout: Fraction = 0.0


class CnnSpec(Section):
    kind: Literal["cnn"]
    channels: Annotated[tuple[Positive, ...], Field(min_length=1)] = (32, 64)
    hidden: Positive = 128
    dropout: Fraction = 0.0


ModelSpec = Annotated[MlpSpec | CnnSpec, Field(discriminator="kind")]


class OptimizerSpec(Section):
    kind: Literal["sgd", "adam", "adamw"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    momentum: Fraction = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _momentum_is_used(self) -> Self:
        if self.momentum and self.kind != "sgd":
            raise ValueError(f"momentum belongs to sgd, {self.kind} does not read it")
        return self


class TrainSpec(Section):
    run: str | None = None
    workers: Positive = 1
    cpus_per_worker: Positive = 1
    gpus_per_worker: Annotated[int, Field(ge=0)] = 0
    epochs: Positive = 10
    steps: Positive | None = None
    global_batch: Positive = 64
    optimizer: OptimizerSpec = OptimizerSpec()
    seed: int = 0
    checkpoint_steps: Positive = 100
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    max_failures: Annotated[int, Field(ge=0)] = 3

    @model_validator(mode="after")
    def _every_worker_gets_rows(self) -> Self:
        if self.global_batch < self.workers:
            raise ValueError(
                f"global_batch {self.global_batch} leaves workers without rows, "
                f"it must be at least workers ({self.workers})"
            )
        return self

    @field_validator("run")
    @classmethod
    def _run_is_a_name(cls, run: str | None) -> str | None:
        return _named(run) if run is not None else None


class EvaluateSpec(Section):
    batch: Positive = 512


class DeploySpec(Section):
    replicas: Positive = 1
    max_body_mib: Annotated[float, Field(gt=0)] = 8
    max_queued_requests: Positive = 256
    request_timeout_s: Annotated[float, Field(gt=0)] = 30


class RunSpec(Section):
    """Everything a run needs, from the raw data to the HTTP endpoint."""

    name: str
    root: str = "s3://heliostat"
    data: DataSpec
    model: ModelSpec
    train: TrainSpec = TrainSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    deploy: DeploySpec = DeploySpec()

    @field_validator("name")
    @classmethod
    def _name_is_a_name(cls, name: str) -> str:
        return _named(name)


def _named(name: str) -> str:
    if not NAME_PATTERN.fullmatch(name):
        raise ValueError(f"{name[:80]!r} is not a name: use {NAME_RULE}")
    return name


def load(path: str | Path, overrides: tuple[str, ...] = ()) -> RunSpec:
    """Read the spec at `path` and apply `section.key=value` overrides, values in YAML.

    Raises:
        HeliostatError: the file cannot be read, or a key is unknown, missing or out of range;
            the sentence names the file and the path of each key.
    """
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise HeliostatError(f"cannot read the spec {path}: {error}") from error
    except yaml.YAMLError as error:
        raise HeliostatError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise HeliostatError(f"{path} must be a mapping with name, data, model and train")
    for override in overrides:
        _apply(document, override)
    return parse(document, origin=str(path))


def parse(document: dict[str, Any], origin: str = "the spec") -> RunSpec:
    """Check `document` against the typed sections; `origin` names it in the message.

    Raises:
        HeliostatError: a key is unknown, missing or out of range.
    """
    try:
        return RunSpec.model_validate(document)
    except ValidationError as error:
        raise HeliostatError(f"{origin}: " + "; ".join(map(_sentence, error.errors()))) from error


def dump(spec: RunSpec) -> dict[str, Any]:
    """The resolved spec as plain JSON values; `parse(dump(spec)) == spec`."""
    return spec.model_dump(mode="json")


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`: the same values give the same digest."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _apply(document: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise HeliostatError(f"{override!r} is not an override: write section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise HeliostatError(f"the value in {override!r} is not YAML") from error
    section = document
    for key in keys[:-1]:
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise HeliostatError(f"{override!r}: {key} is a value, not a section")
    section[keys[-1]] = value


def _sentence(error: Any) -> str:
    """One pydantic error as `path.of.key: what is wrong`."""
    path = ".".join(str(part) for part in error["loc"] if part not in ("mlp", "cnn"))
    match error["type"]:
        case "extra_forbidden":
            return f"{path}: unknown key"
        case "missing":
            return f"{path}: required, but missing"
        case _:
            message = error["msg"].removeprefix("Value error, ")
            return f"{path}: {message[0].lower()}{message[1:]}, given {error['input']!r}"[:400]
