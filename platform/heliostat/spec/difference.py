"""What differs between two runs that are written down, by key."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from heliostat.errors import HeliostatError

MAX_KEYS = 5
_ABSENT = object()


def diff(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """`section.key: old -> new` for every key whose value differs, sorted by key."""
    old, new = dict(_flatten(before)), dict(_flatten(after))
    return [
        f"{key}: {_show(old.get(key, _ABSENT))} -> {_show(new.get(key, _ABSENT))}"
        for key in sorted(old.keys() | new.keys())
        if _show(old.get(key, _ABSENT)) != _show(new.get(key, _ABSENT))
    ]


def refuse_changes(run: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raises HeliostatError with the first keys that differ, if any do."""
    if changes := diff(before, after):
        more = len(changes) - MAX_KEYS
        raise HeliostatError(
            f"run {run} was started with another spec ({'; '.join(changes[:MAX_KEYS])}"
            + f"; and {more} more" * (more > 0)
            + "): choose another train.run, or none to derive one, or set train.force=true"
        )


def _flatten(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, sort_keys=True)
