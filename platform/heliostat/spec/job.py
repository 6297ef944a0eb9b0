"""The job section: whose work it is, and what it goes before."""

from typing import Annotated

from pydantic import Field, field_validator

from heliostat.spec.section import Section, refuse_other_names

Priority = Annotated[int, Field(ge=-1000, le=1000, strict=True)]


class JobSpec(Section):
    """A training of higher `priority` goes before those of lower, which make room for it."""

    priority: Priority = 0
    team: str | None = None

    @field_validator("team")
    @classmethod
    def _team_is_a_name(cls, team: str | None) -> str | None:
        return refuse_other_names(team) if team is not None else None
