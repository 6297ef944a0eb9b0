"""How a model sees a row: statistics of the training split, and the columns they belong to."""

import base64
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heliostat.signature import Blocks, Input, Interaction, Picture, Series, Text, Vector

Columns = dict[str, NDArray[Any]]

IMAGE = "image"
TOKENS = "tokens"
TEXT = "text"
NUMBERS = "numbers"  # all numeric columns of a table side by side
SERIES = "series"
COLUMN_PREFIX = "x."  # of the other columns of a table


@dataclass(frozen=True)
class ImageFeatures:
    """Pixels: `mean` and `std` per channel, of pixel / 255 over the training split."""

    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class NumericColumn:
    """A number: one input, and a second one that says "missing" where training saw that."""

    name: str
    mean: float
    std: float
    has_missing: bool


@dataclass(frozen=True)
class CategoryColumn:
    """A text: one input for each of `values` and one for "other or missing"."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class IdColumn:
    """Who or what a row is about: its place among `values` from 1 on, and 0 where it is not there.

    `values` are all that the training split has, as texts; a whole number has no decimal point.
    """

    name: str
    values: tuple[str, ...]

    @cached_property
    def places(self) -> dict[str | None, int]:
        return {value: place for place, value in enumerate(self.values, start=1)}


Column = NumericColumn | CategoryColumn | IdColumn

COLUMN_KINDS = {"numeric": NumericColumn, "category": CategoryColumn, "id": IdColumn}


@dataclass(frozen=True)
class TableFeatures:
    """`unused` are the places, among the numbers that a row is stored with, of dropped columns."""

    columns: tuple[Column, ...]
    unused: tuple[int, ...] = ()

    @cached_property
    def numeric(self) -> tuple[NumericColumn, ...]:
        return tuple(column for column in self.columns if isinstance(column, NumericColumn))

    @cached_property
    def numeric_names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.numeric)

    @cached_property
    def ids(self) -> tuple[IdColumn, ...]:
        return tuple(column for column in self.columns if isinstance(column, IdColumn))

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(column.name for column in self.columns)

    @cached_property
    def slots(self) -> "Slots":
        return _assign_slots(self)


@dataclass(frozen=True)
class Slots:
    """Which of a row's `width` inputs each column has, with what scales all numbers at once.

    `numbers` and `flags` are the inputs of the numeric columns and of those `flagged` for missing
    values; `categories` are (column, input of each value, input of all others). `owners` are the
    names of the columns that the inputs belong to.
    """

    width: int
    numbers: NDArray[np.intp]
    flagged: NDArray[np.intp]
    flags: NDArray[np.intp]
    categories: tuple[tuple[str, dict[str, int], int], ...]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    owners: tuple[str, ...]


@dataclass(frozen=True)
class SeriesFeatures:
    """`length` is that of the longest row of all splits; `mean` and `std` are per channel.

    A length is a shape, like the height of an image, so it is not a statistic of the training
    split: a row that is longer than any training row is still read whole.
    """

    length: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class BlockFeatures:
    """Packed documents, each closed by `end`; `token_bytes` is the text's bytes per token id.

    `tokenizer` is the SHA-256 of the tokenizer.json that made the tokens; `chat_template` is the
    Jinja template of a chat that came with it, if one did.
    """

    length: int
    vocab: int
    end: int
    tokenizer: str
    token_bytes: tuple[int, ...]
    chat_template: str = ""


@dataclass(frozen=True)
class TextFeatures:
    """Texts of up to `length` tokens of the tokenizer.json with this SHA-256."""

    length: int
    vocab: int
    tokenizer: str


Features = ImageFeatures | TableFeatures | SeriesFeatures | BlockFeatures | TextFeatures

FEATURE_KINDS = {
    "image": ImageFeatures,
    "series": SeriesFeatures,
    "blocks": BlockFeatures,
    "text": TextFeatures,
}


def features_to_json(features: Features) -> dict[str, Any]:
    """The features as plain JSON values."""
    if isinstance(features, TableFeatures):
        columns = [
            {"kind": _kind_of(COLUMN_KINDS, column)} | asdict(column) for column in features.columns
        ]
        return {"kind": "table", "columns": columns, "unused": list(features.unused)}
    fields = asdict(features)
    if isinstance(features, BlockFeatures):  # so many numbers that they stand as 16 bits in base64
        sizes = np.array(features.token_bytes, "<u2").tobytes()
        fields["token_bytes"] = base64.b64encode(sizes).decode()
        if not features.chat_template:
            del fields["chat_template"]
    return {"kind": _kind_of(FEATURE_KINDS, features), **fields}


def features_from_json(document: dict[str, Any]) -> Features:
    """The inverse of `features_to_json`."""
    fields = dict(document)
    kind = fields.pop("kind")
    if kind == "table":
        return TableFeatures(
            tuple(map(_column_from_json, fields["columns"])), tuple(fields["unused"])
        )
    if kind == "blocks":
        sizes = np.frombuffer(base64.b64decode(fields["token_bytes"]), "<u2")
        fields["token_bytes"] = sizes.tolist()
    features: Features = FEATURE_KINDS[kind](
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
    )
    return features


def _kind_of(kinds: dict[str, Any], value: object) -> str:
    return next(kind for kind, known in kinds.items() if isinstance(value, known))


def _column_from_json(document: dict[str, Any]) -> Column:
    fields = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in document.items()
        if name != "kind"
    }
    column: Column = COLUMN_KINDS[document["kind"]](**fields)
    return column


def input_of(features: Features) -> Input:
    """What a network gets of a row."""
    match features:
        case ImageFeatures():
            return Picture(features.channels, features.height, features.width)
        case SeriesFeatures():
            return Series(features.length, features.channels)
        case BlockFeatures():
            return Blocks(features.length, features.vocab, features.end)
        case TextFeatures():
            return Text(features.length, features.vocab)
        case TableFeatures():
            if features.ids:
                sizes = tuple(len(column.values) + 1 for column in features.ids)
                return Interaction(sizes, features.slots.width)
            return Vector(features.slots.width)


def token_type(vocab: int) -> type[np.uint16] | type[np.int32]:
    """How shards store tokens: in the smaller of the two types that holds them."""
    return np.uint16 if vocab <= 2**16 else np.int32


def _assign_slots(features: TableFeatures) -> Slots:
    """Inputs in the order of the columns; an id has none here, it is looked up instead."""
    numbers: list[int] = []
    flagged, flags, categories, owners, width = [], [], [], list[str](), 0
    for column in features.columns:
        match column:
            case NumericColumn(has_missing=has_missing):
                if has_missing:
                    flagged.append(len(numbers))
                    flags.append(width + 1)
                numbers.append(width)
                width += 1 + has_missing
            case CategoryColumn(values=values):
                places = {value: width + place for place, value in enumerate(values)}
                categories.append((COLUMN_PREFIX + column.name, places, width + len(values)))
                width += len(values) + 1
        owners += [column.name] * (width - len(owners))
    return Slots(
        width,
        np.array(numbers, np.intp),
        np.array(flagged, np.intp),
        np.array(flags, np.intp),
        tuple(categories),
        np.array([column.mean for column in features.numeric], np.float64),
        np.array([column.std for column in features.numeric], np.float64),
        tuple(owners),
    )
