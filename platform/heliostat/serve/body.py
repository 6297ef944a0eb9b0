"""Bodies of requests as JSON values, and as typed values with the path of what is wrong."""

from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from heliostat.serve.replies import Refusal


class Part(BaseModel):
    """A typed part of a body: what is not asked for is refused, and no value is converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


AnyPart = TypeVar("AnyPart", bound=Part)


def parse_json(body: bytes | memoryview) -> Any:
    """The JSON value of `body`.

    What the fast parser refuses gets a second look: the other one takes numbers of any size, and
    says where the text ends to be JSON.

    Raises:
        Refusal: 400, it is not JSON; NaN and Infinity are not.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    try:
        return from_json(bytes(body), allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from error


def check(part: type[AnyPart], document: object) -> AnyPart:
    """The typed part that `document` is.

    Raises:
        Refusal: 422, the first value that does not fit, by its path.
    """
    try:
        return part.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path = _write_path(first["loc"]) or "body"
        raise Refusal(422, f"{path}: {first['msg'][:200]}", path) from error


def _write_path(keys: tuple[int | str, ...]) -> str:
    """`inputs[0].shape` of ("inputs", 0, "shape")."""
    parts = [f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys]
    return "".join(parts).removeprefix(".")
