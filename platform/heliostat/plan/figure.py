"""One planned quantity: its value with its unit, why it is so, and where the formula is from."""

from dataclasses import dataclass

PREFIXES = {"B": 1024, "B/s": 1000, "FLOP": 1000, "FLOP/s": 1000}


@dataclass(frozen=True)
class Figure:
    name: str
    value: float
    unit: str
    reason: str
    source: str
