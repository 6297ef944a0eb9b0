"""Texts and numbers of a table's cells: what is missing, what is a number, what is the same id."""

import re
from collections.abc import Collection
from typing import cast

MAX_NUMBER = 1e100  # so that squares and their sums are numbers too
WHOLE_NUMBER = re.compile(r"([+-]?\d+)\.0*")
MISSING_TEXTS = frozenset({"", "NA", "N/A", "nan", "NaN", "null", "NULL", "None", "?"})


def strip_text(value: str) -> str | None:
    """`value` without surrounding blanks, or None if nothing is left."""
    return value.strip() or None


def clean_text(value: str) -> str | None:
    """`value` without surrounding blanks, or None if it is one of the words for "missing"."""
    stripped = value.strip()
    return None if stripped in MISSING_TEXTS else stripped


def parse_number(text: str) -> float | None:
    """`text` as a number of at most MAX_NUMBER, None if it is not one."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) <= MAX_NUMBER and "_" not in text else None


def are_ratings(labels: Collection[str]) -> bool:
    """Whether distinct labels are numbers, and more than the two that may say yes and no."""
    return len(labels) > 2 and all(parse_number(label) is not None for label in labels)


def are_quantities(labels: Collection[str]) -> bool:
    """Whether distinct labels are numbers and some of them fractions; two may still be classes."""
    return are_ratings(labels) and any((parse_number(label) or 0) % 1 for label in labels)


def shorten_number(text: str) -> str:
    """A whole number without its decimal point, so that 5 and 5.0 are one label or id."""
    match = WHOLE_NUMBER.fullmatch(text)
    return match[1] if match else text


def write_number(value: float) -> str:
    """The shortest text of a number, a whole one without a decimal point."""
    return str(int(value)) if value % 1 == 0 else repr(value)


def is_number(value: object, most: float = MAX_NUMBER) -> bool:
    return type(value) in (int, float) and abs(cast(float, value)) <= most
