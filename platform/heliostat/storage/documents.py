"""JSON objects of a store as typed values."""

from functools import cache
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from heliostat.errors import HeliostatError
from heliostat.storage import Store

T = TypeVar("T")
_adapter = cache(TypeAdapter)


class Damaged(HeliostatError):
    """The object is there, but it is not what was written: cut, empty, or of other fields."""


def read_document(store: Store, key: str, kind: type[T]) -> T:
    """The object as a `kind`: a dataclass, or what else pydantic can check.

    Raises:
        Missing: there is no such object.
        Damaged: it is not the JSON of a `kind`; names the object.
    """
    try:
        return _adapter(kind).validate_json(store.read(key))  # type: ignore
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise Damaged(f"{store.uri}/{key} is damaged ({reason}): delete or restore it") from error
