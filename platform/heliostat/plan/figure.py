"""One planned quantity: its value with its unit, why it is so, and where the formula is from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    name: str
    value: float
    unit: str
    reason: str
    source: str
