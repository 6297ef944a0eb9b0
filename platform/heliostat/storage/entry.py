"""What every store shares: the entry of an object, the rules for keys, and two exceptions."""

import re
from dataclasses import dataclass

from heliostat.errors import HeliostatError

HIDDEN = ".heliostat-local"


@dataclass(frozen=True)
class Entry:
    """One stored object: its key below the store's URI, its size in bytes and its version."""

    key: str
    size: int
    etag: str


class Conflict(Exception):
    """A conditional write lost: the object exists already, or is no longer the one expected."""


class Missing(HeliostatError):
    """There is no such object."""


def join(*parts: str) -> str:
    """The parts that are not empty, as one key."""
    return "/".join(part for part in parts if part)


def check_key(key: str) -> str:
    """The key itself; HeliostatError if no store may hold an object by that name."""
    names = key.split("/")
    reserved = any(name in ("", ".", "..") or name.startswith(HIDDEN) for name in names)
    if reserved or re.search(r"[\0\\\ud800-\udfff]", key):
        raise HeliostatError(
            f"{key[:100]!r} is not a key: use names in UTF-8 joined by single '/', "
            "none of them '.' or '..', without NUL and backslash"
        )
    return key
