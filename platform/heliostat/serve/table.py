"""What is deployed, as one object in the bucket that moves from state to state."""

from collections.abc import Callable
from contextlib import suppress

from pydantic import Field, ValidationError

from heliostat.errors import HeliostatError
from heliostat.spec import CandidateSpec, DeploySpec, Positive, Section
from heliostat.storage import Conflict, Missing, Store

TABLE_KEY = "serving/heliostat.json"


class Candidate(Section):
    """A version that may be served next, and on which terms; `proposal` tells two tries apart."""

    number: Positive
    proposal: str
    terms: CandidateSpec


class Placement(Section):
    """The version of a model that answers, those that answer by their number, newest first."""

    number: Positive
    previous: tuple[Positive, ...] = ()
    candidate: Candidate | None = None

    @property
    def numbers(self) -> tuple[int, ...]:
        return (self.number, *self.previous)


class Table(Section):
    """What is deployed: the place of each model, and how all of them are served."""

    models: dict[str, Placement] = Field(default_factory=dict)
    deploy: DeploySpec = DeploySpec()
    code: str = ""


def read_table(store: Store) -> Table:
    """Raises HeliostatError: what is in the bucket is no table."""
    try:
        return Table.model_validate_json(store.read(TABLE_KEY))
    except Missing:
        return Table()
    except ValidationError as error:
        raise HeliostatError(
            f"{store.uri}/{TABLE_KEY}, the table of what is served, is damaged: delete the object "
            "and deploy every model again"
        ) from error


def change_table(store: Store, change: Callable[[Table], Table]) -> Table:
    """Move the table from what it is to `change` of that; return what it was."""
    while True:
        entry, before = store.stat(TABLE_KEY), read_table(store)
        data = change(before).model_dump_json(indent=1).encode()
        with suppress(Conflict):
            store.replace(TABLE_KEY, data, entry.etag) if entry else store.create(TABLE_KEY, data)
            return before


def succeed(placed: Placement | None, number: int, keep: int) -> Placement:
    """`number` answers from now on, and `keep` of those before it by their number."""
    if placed is None:
        return Placement(number=number)
    previous = tuple(other for other in placed.numbers if other != number)
    return Placement(number=number, previous=previous[:keep])


def propose(placed: Placement | None, candidate: Candidate) -> Placement:
    """The candidate is beside what answers.

    Raises:
        HeliostatError: nothing answers yet, or the same version does.
    """
    if placed is None:
        raise HeliostatError(
            "there is no version yet beside which a candidate could be: deploy one without "
            "deploy.candidate first"
        )
    if candidate.number == placed.number:
        raise HeliostatError(
            f"version {placed.number} is served already: a candidate is another version"
        )
    return placed.model_copy(update={"candidate": candidate})


def withdraw(placed: Placement, candidate: Candidate) -> Placement:
    """Without `candidate`; one that has taken its place stays."""
    if placed.candidate != candidate:
        return placed
    return placed.model_copy(update={"candidate": None})


def roll_back(placed: Placement, name: str) -> Placement:
    """The version before answers again, and the one that answers now is the next one back.

    Raises:
        HeliostatError: there is none before.
    """
    if not placed.previous:
        raise HeliostatError(
            f"{name}:{placed.number} has no version before it that was kept: deploy one by its "
            f"number, as `heliostat deploy {name}:1`"
        )
    first, *others = placed.previous
    return Placement(number=first, previous=(placed.number, *others))


def place(table: Table, name: str, placed: Placement | None, **how: object) -> Table:
    """`table` with `name` placed so, or without it; `how` are other fields of the table."""
    others = {other: kept for other, kept in table.models.items() if other != name}
    models = others | ({name: placed} if placed else {})
    return table.model_copy(update={"models": models, **how})


def take_back(table: Table, *, name: str, written: Table, before: Table) -> Table:
    """`table` as if the deploy of `name` from `before` to `written` had not been.

    Every deploy sets `deploy` and `code`: in a table that is no longer `written` they are those of
    somebody else, as the model is if its place is another one. A version that never answered is no
    version to go back to, and what it pushed out is there again.
    """
    if table == written:
        return before
    failed, earlier, now = written.models[name], before.models.get(name), table.models.get(name)
    if now == failed:
        return place(table, name, earlier)
    if now is None or failed.number not in now.previous:
        return table
    since = now.numbers[: now.numbers.index(failed.number)]
    before_it = earlier.numbers if earlier else ()
    previous = (*since[1:], *(number for number in before_it if number not in since))
    kept = previous[: table.deploy.keep_previous]
    return place(table, name, now.model_copy(update={"previous": kept}))
