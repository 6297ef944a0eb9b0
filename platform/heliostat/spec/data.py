"""The data section: what the raw objects are, what is predicted, and how rows are split."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from heliostat.spec.section import Fraction, Natural, NaturalFloat, Positive, Section, Seed

MAX_CATEGORIES = 10_000  # as many values of a column are counted, shard by shard


class SplitSpec(Section):
    """Shares of the rows that are held out; training gets the rest.

    With `test_files`, a glob over keys below `data.source`, the rows of matching files are the test
    split, and the share of validation is taken from the others.
    """

    validation: Fraction = 0.1
    test: Fraction = 0.1
    test_files: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _files_replace_the_share(cls, section: Any) -> Any:
        if isinstance(section, dict) and section.get("test_files"):
            if section.get("test"):
                raise ValueError("give test or test_files, not both")
            return {**section, "test": 0.0}
        return section

    @model_validator(mode="after")
    def _training_gets_rows(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test leave no rows for training")
        return self


class TextSpec(Section):
    """How texts become tokens: a byte-level BPE of `vocab` tokens, trained on the training split.

    `tokenizer` names a tokenizer.json to use instead. A row is `block` tokens: of packed documents
    for task language, of one text, cut there, for the others. `column` holds the text of a table.
    """

    vocab: Annotated[int, Field(ge=260, strict=True)] = 4096
    block: Annotated[int, Field(ge=8, strict=True)] = 256
    column: str = "text"
    tokenizer: str | None = None


class SyntheticSpec(Section):
    """A table for want of a real one: `rows` of `inputs` numbers and of `outputs` that follow.

    For a task of classes the first output says which of two a row is in. `noise` is the deviation
    of what is added to the outputs, which themselves deviate by about 0.6.
    """

    rows: Positive
    inputs: Positive
    outputs: Positive = 1
    noise: NaturalFloat = 0.1
    seed: Seed = 0


class DataSpec(Section):
    """`label` is one column, or several of numbers for task regression.

    `header` names the columns of CSV files that have no first line for it. Of two classes
    `positive` is the one that is sought, which a ranking takes for liked; else the second in order.
    """

    source: str
    format: Literal["auto", "images", "idx", "csv", "parquet", "text", "series"] = "auto"
    task: Literal["auto", "classification", "regression", "language"] = "auto"
    label: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    positive: str | None = None
    header: tuple[str, ...] = ()
    columns: dict[str, Literal["numeric", "category", "id", "ignore"]] = Field(default_factory=dict)
    max_categories: Annotated[int, Field(gt=0, le=MAX_CATEGORIES, strict=True)] = 64
    image_size: tuple[Positive, Positive] | None = None
    channels: Literal[1, 3] | None = None
    text: TextSpec = TextSpec()
    synthetic: SyntheticSpec | None = None
    max_bad_rows: Natural = 0
    split: SplitSpec = SplitSpec()
    seed: Seed = 0
    shard_mib: Positive = 64
    rows_per_group: Positive = 1024
