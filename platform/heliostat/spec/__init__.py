"""A run, written down: a YAML file of typed, frozen sections and `section.key=value` overrides."""

import hashlib
import json
import re
import reprlib
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator

from heliostat.errors import HeliostatError
from heliostat.spec.data import MAX_CATEGORIES, DataSpec, SplitSpec, SyntheticSpec, TextSpec
from heliostat.spec.deploy import CandidateSpec, DeploySpec, VllmSpec
from heliostat.spec.job import JobSpec
from heliostat.spec.model import (
    CnnSpec,
    CustomSpec,
    EncoderSpec,
    GptSpec,
    MlpSpec,
    ModelSpec,
    RecsysSpec,
    RnnSpec,
    RopeScalingSpec,
)
from heliostat.spec.section import (
    NAME_PATTERN,
    NAME_RULE,
    Positive,
    PositiveFloat,
    Section,
    check_name,
    refuse_other_names,
)
from heliostat.spec.train import OptimizerSpec, ScheduleSpec, StopSpec, TrainSpec

__all__ = [
    "MAX_CATEGORIES",
    "NAME_PATTERN",
    "NAME_RULE",
    "CandidateSpec",
    "CnnSpec",
    "CustomSpec",
    "DataSpec",
    "DeploySpec",
    "EncoderSpec",
    "EvaluateSpec",
    "GptSpec",
    "JobSpec",
    "MlpSpec",
    "ModelSpec",
    "OptimizerSpec",
    "Positive",
    "PositiveFloat",
    "PredictSpec",
    "RecsysSpec",
    "RnnSpec",
    "RopeScalingSpec",
    "RunSpec",
    "ScheduleSpec",
    "Section",
    "SplitSpec",
    "StopSpec",
    "SyntheticSpec",
    "TextSpec",
    "TrainSpec",
    "VllmSpec",
    "check_name",
    "digest",
    "dump",
    "load",
    "parse",
    "parse_options",
    "reference",
]

# PyYAML raises ValueError for an impossible date or number, RecursionError for endless nesting.
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)
MAX_SENTENCES = 5
MAX_LISTED = 9

AnySection = TypeVar("AnySection", bound=Section)


class EvaluateSpec(Section):
    version: Positive | None = None
    batch: Positive = 512


class PredictSpec(Section):
    """`source` holds the rows; of them the share `max_bad` may be such that cannot be used.

    `header` names the columns of CSV files that have no first line for it.
    """

    source: str | None = None
    header: tuple[str, ...] = ()
    format: Literal["auto", "images", "idx", "csv", "parquet", "series"] = "auto"
    version: Positive | None = None
    batch: Positive = 512
    workers: Positive = 2
    max_bad: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.01


class RunSpec(Section):
    """Everything a run needs, from the raw data to the HTTP endpoint."""

    name: str
    root: str = "s3://heliostat"
    data: DataSpec
    model: ModelSpec
    train: TrainSpec = TrainSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    predict: PredictSpec = PredictSpec()
    deploy: DeploySpec = DeploySpec()
    job: JobSpec = JobSpec()

    @field_validator("name")
    @classmethod
    def _name_is_a_name(cls, name: str) -> str:
        return refuse_other_names(name)


class _Loader(yaml.SafeLoader):
    """YAML without what a spec has no use for: keys given twice, and aliases, which can explode."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases are not read", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                problem = f"the key {key.value!s:.80} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-4 for a text, because it has no dot.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def load(path: str | Path, overrides: tuple[str, ...] = ()) -> RunSpec:
    """Read the spec at `path` and apply `section.key=value` overrides, values in YAML.

    Raises:
        HeliostatError: the file cannot be read, or a key is unknown, missing or out of range;
            the sentence names the file and the path of each key.
    """
    document = _read(path, "name, data, model and train")
    for override in overrides:
        _apply(document, override)
    return parse(document, origin=str(path))


def load_section(
    kind: type[AnySection],
    path: str | Path | None,
    overrides: tuple[str, ...],
    defaults: dict[str, Any],
) -> AnySection:
    """A section of its own: what a YAML file says, laid over `defaults`, then `key=value`.

    Raises:
        HeliostatError: the file cannot be read, or a key is unknown or out of range.
    """
    given = _read(path, ", ".join(kind.model_fields)) if path else {}
    document = lay_over(defaults, given)
    for override in overrides:
        _apply(document, override)
    return _check(kind, document, str(path) if path else "the command line")


def lay_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both mappings in one; what `above` says counts, section by section."""
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        nested = isinstance(inner, dict) and isinstance(value, dict)
        merged[key] = lay_over(inner, value) if nested else value  # type: ignore[arg-type]
    return merged


def _read(path: str | Path, keys: str) -> dict[str, Any]:
    try:
        document = _parse_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise HeliostatError(
            f"cannot read the spec {path}: there is no such file in {Path.cwd()}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise HeliostatError(f"cannot read the spec {path}: {error}") from error
    except YAML_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise HeliostatError(f"{path} is not YAML: {reason}") from error
    if not isinstance(document, dict):
        raise HeliostatError(f"{path} must be a mapping with {keys}")
    return document


def parse(document: dict[str, Any], origin: str = "the spec") -> RunSpec:
    """Check `document` against the typed sections; `origin` names it in the message.

    Raises:
        HeliostatError: a key is unknown, missing or out of range.
    """
    return _check(RunSpec, document, origin)


def parse_options(kind: type[AnySection], overrides: tuple[str, ...]) -> AnySection:
    """A section of its own, from `key=value` alone.

    Raises:
        HeliostatError: a key is unknown or out of range.
    """
    document: dict[str, Any] = {}
    for override in overrides:
        _apply(document, override)
    return _check(kind, document, "the command line")


def _check(kind: type[AnySection], document: dict[str, Any], origin: str) -> AnySection:
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        sentences = _explain(error, document, kind)
        told = "; ".join(sentences[:MAX_SENTENCES])
        more = len(sentences) - MAX_SENTENCES
        raise HeliostatError(f"{origin}: {told}" + f"; and {more} more" * (more > 0)) from error


def dump(spec: RunSpec) -> dict[str, Any]:
    """The resolved spec as plain JSON values; `parse(dump(spec)) == spec`."""
    return spec.model_dump(mode="json")


def reference(name: str, version: int | None) -> str:
    """How the registry is asked for a version: `name:3`, or `name` for the newest."""
    return f"{name}:{version}" if version else name


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`: the same values give the same digest."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _apply(document: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise HeliostatError(f"{override[:80]!r} is not an override: write section.key=value")
    try:
        value = _parse_yaml(text)
    except YAML_ERRORS as error:
        raise HeliostatError(f"the value in {override[:80]!r} is not YAML") from error
    section = document
    for key in keys[:-1]:
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise HeliostatError(f"{override[:80]!r}: {key} is a value, not a section")
    section[keys[-1]] = value


def _explain(refused: ValidationError, document: Any, kind: type[Section]) -> list[str]:
    """A sentence for each key: `path.of.key: what is wrong`; never the content of a whole section.

    A key that may be one of several kinds is refused once by each of them.
    """
    by_path: dict[tuple[str | int, ...], list[Any]] = {}
    for error in refused.errors():
        by_path.setdefault(_find_keys(error, document), []).append(error)
    inner = [path for path in by_path if not any(_is_above(path, other) for other in by_path)]
    return [
        f"{_show_path(path)}{_reason(by_path[path])}{_list_known(by_path[path][0], kind)}"
        for path in inner
    ]


def _list_known(error: Any, kind: type[Section]) -> str:
    """The keys that there are beside an unknown one of `kind` itself, if they are few."""
    is_unknown = error["type"] == "extra_forbidden" and len(error["loc"]) == 1
    known = ", ".join(kind.model_fields)
    return f", known are {known}" if is_unknown and len(kind.model_fields) <= MAX_LISTED else ""


def _find_keys(error: Any, document: Any) -> tuple[str | int, ...]:
    """The part of pydantic's location that is in the document: without the kinds it has tried."""
    keys: list[str | int] = []
    at = document
    missing = error["loc"] if error["type"] == "missing" else ()
    for i, key in enumerate(error["loc"]):
        if isinstance(at, dict) and (key in at or error["loc"][: i + 1] == missing):
            keys.append(key)
            at = at.get(key)
        elif isinstance(at, list) and isinstance(key, int):
            keys.append(key)
            at = at[key] if key < len(at) else None
    return tuple(keys)


def _is_above(path: tuple[str | int, ...], other: tuple[str | int, ...]) -> bool:
    return len(path) < len(other) and other[: len(path)] == path


def _reason(errors: list[Any]) -> str:
    error = errors[0]
    match error["type"]:
        case "extra_forbidden":
            return ": unknown key"
        case "missing":
            return ": required, but missing"
        case "union_tag_not_found":
            return ".kind: required, but missing"
        case "union_tag_invalid":
            return f".kind: should be {error['ctx']['expected_tags']}"
        case "model_type" | "model_attributes_type":
            return ": should be a section of keys"
        case _:
            first, *others = map(_message, errors)
            message = " or ".join([first, *(other.removeprefix("should be ") for other in others)])
            return f": {message[:200]}{_show_given(error['input'])}"


def _message(error: Any) -> str:
    """In the words of YAML, which has lists and no tuples."""
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = f"{message[0].lower()}{message[1:]}"
    return message.replace("valid tuple", "list").replace("tuple should", "should")


def _show_path(path: tuple[str | int, ...]) -> str:
    return ".".join(_show_key(str(key)) for key in path)


def _show_key(key: str) -> str:
    return key[:80] if key.isprintable() else ascii(key[:80])


def _show_given(value: Any) -> str:
    return "" if isinstance(value, dict | list) else f", given {reprlib.repr(value)}"
