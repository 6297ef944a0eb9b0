"""What every section of a spec shares: its base class, its numbers, and the rule for names."""

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from heliostat.errors import HeliostatError

NAME_PATTERN = re.compile(r"[a-z0-9](?:[a-z0-9_-]|\.(?!\.)){0,62}")
NAME_RULE = (
    "1 to 63 of a-z, 0-9, '.', '_' and '-', starting with a letter or digit and without '..'"
)

# Strict, because Python would take true for the number 1.
Fraction = Annotated[float, Field(ge=0, le=1, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0, strict=True)]
NaturalFloat = Annotated[float, Field(ge=0, strict=True)]
Positive = Annotated[int, Field(gt=0, strict=True)]
Natural = Annotated[int, Field(ge=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def check_name(name: str) -> str:
    """Return `name` if it may name a model, a data set, a run or an alias.

    Raises:
        HeliostatError: the name does not follow `NAME_RULE`.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise HeliostatError(f"{name[:80]!r} is not a name: use {NAME_RULE}")
    return name


def refuse_other_names(name: str) -> str:
    """`check_name` for pydantic, which expects a ValueError."""
    try:
        return check_name(name)
    except HeliostatError as error:
        raise ValueError(str(error)) from error
