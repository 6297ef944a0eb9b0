"""Nested lists of JSON numbers as arrays, looked at all at once."""

from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_DEPTH = 8
WHOLE = frozenset({int})
NUMBERS = frozenset({int, float})
NUMBERS_OR_NULL = NUMBERS | {type(None)}


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


def find_first(wrong: NDArray[np.bool_]) -> tuple[int, ...]:
    """The place of the first value that is True; there must be one."""
    return tuple(int(place) for place in np.unravel_index(int(wrong.argmax()), wrong.shape))


def are_pixels(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Which values are in 0..255; NaN is not."""
    return (values >= 0) & (values <= 255)
