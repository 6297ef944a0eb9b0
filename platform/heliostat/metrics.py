"""What a run reports: plain finite numbers."""

import math
from collections.abc import Mapping
from typing import Any

from heliostat.errors import HeliostatError


def plain(metrics: Mapping[str, Any]) -> dict[str, float]:
    """`metrics` as Python floats, whatever library the scalars came from.

    Raises:
        HeliostatError: a value is not one finite number; the sentence names its key.
    """
    return {key: _scalar(key, value) for key, value in metrics.items()}


def _scalar(key: str, value: Any) -> float:
    try:
        if isinstance(value, str | bytes):
            raise TypeError("text")
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise HeliostatError(
            f"metric {key!r} is a {type(value).__name__}, it must be one number"
        ) from error
    if not math.isfinite(number):
        raise HeliostatError(f"metric {key!r} is {number}, it must be finite")
    return number
