"""Nested lists of JSON numbers as arrays, looked at all at once."""

from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

MAX_DEPTH = 8
WHOLE = frozenset({int})
NUMBERS = frozenset({int, float})
NUMBERS_OR_NULL = NUMBERS | {type(None)}
OF_NUMBERS = b"0123456789+-.eE \t\r\n"  # what stands in a number, or around it
BRACKETS_TO_BLANKS = bytes.maketrans(b"[]", b"  ")


def read_numbers(
    values: object, kinds: frozenset[type] = NUMBERS, dtype: Any = np.float64
) -> NDArray[Any] | None:
    """The lists as one array, NaN where a value is null; None if a value is of no kind in `kinds`.

    None as well if a value is NaN, if lists of one level differ in length, if there are more than
    MAX_DEPTH levels, or if a whole number does not fit `dtype`.
    """
    if type(values) is not list:
        return None
    shape = [len(values)]
    level: list[Any] = values
    while (found := set(map(type, level))) == {list}:
        lengths = set(map(len, level))
        if len(lengths) > 1 or len(shape) == MAX_DEPTH:
            return None
        shape += lengths
        level = list(chain.from_iterable(level))
    if not found <= kinds:
        return None
    try:
        numbers = np.array(level, dtype)
    except OverflowError:
        return None
    missing = level.count(None) if type(None) in found else 0
    return numbers.reshape(shape) if np.isnan(numbers).sum() == missing else None


def scan_numbers(text: bytes, shape: tuple[int, ...]) -> list[float] | None:
    """The numbers of JSON that is a list of at least one array of `shape`, one after another.

    None if it is anything else. What is left without its numbers says whether the lists are as they
    should be, so that none has to be made for each level.
    """
    frame, one = text.translate(None, OF_NUMBERS), _frame(shape)
    rows = (len(frame) - 1) // (len(one) + 1)
    if rows < 1 or frame != b"[" + b",".join([one] * rows) + b"]":
        return None
    try:
        numbers: list[float] = orjson.loads(b"[" + text.translate(BRACKETS_TO_BLANKS) + b"]")
    except orjson.JSONDecodeError:
        return None
    return numbers


@lru_cache(64)
def _frame(shape: tuple[int, ...]) -> bytes:
    """`[[,],[,]]` of (2, 2)."""
    if not shape:
        return b""
    return b"[" + b",".join([_frame(shape[1:])] * shape[0]) + b"]"


def find_first(wrong: NDArray[np.bool_]) -> tuple[int, ...]:
    """The place of the first value that is True; there must be one."""
    return tuple(int(place) for place in np.unravel_index(int(wrong.argmax()), wrong.shape))


def are_pixels(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Which values are in 0..255; NaN is not."""
    return (values >= 0) & (values <= 255)


def are_all_pixels(values: NDArray[Any]) -> bool:
    """Whether every value is in 0..255, without an array of answers in between."""
    return bool(values.size == 0 or (values.min() >= 0 and values.max() <= 255))
