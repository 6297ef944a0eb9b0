"""How a model sees a row: statistics of the training split, and the one code that applies them."""

import base64
import io
import math
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import repeat
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from heliostat.errors import HeliostatError
from heliostat.signature import (
    Blocks,
    Input,
    Interaction,
    NextToken,
    Numbers,
    Output,
    Picture,
    Series,
    Text,
    Vector,
)

Columns = dict[str, NDArray[Any]]
Arrays = tuple[NDArray[Any], ...]

IMAGE = "image"
TOKENS = "tokens"
TEXT = "text"
NUMBERS = "numbers"  # all numeric columns of a table side by side
SERIES = "series"
COLUMN_PREFIX = "x."  # of the other columns of a table
MAX_PIXELS = 64_000_000
MAX_SERVED_PIXELS = 25_000_000  # of an image in a request; a file of 8 KB can have more
MAX_REQUEST_PIXELS = 64_000_000  # of all of them: about a second of one core
MAX_NUMBER = 1e100  # so that squares and their sums are numbers too
MAX_DEVIATIONS = 1e6  # so that any number is one in 32 bits, and stays one in a model
MAX_FLOAT32 = float(np.finfo(np.float32).max)
MAX_LISTED = 20
WHOLE_NUMBER = re.compile(r"([+-]?\d+)\.0*")
MISSING_TEXTS = frozenset({"", "NA", "N/A", "nan", "NaN", "null", "None", "?"})
BROKEN_IMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    OverflowError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
MODES = {1: "L", 3: "RGB"}


class FieldError(HeliostatError):
    """A value in a request that the model cannot take; `field` is its path, `instances[3].age`."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field = field


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
    values; `categories` are (column, input of each value, input of all others).
    """

    width: int
    numbers: NDArray[np.intp]
    flagged: NDArray[np.intp]
    flags: NDArray[np.intp]
    categories: tuple[tuple[str, dict[str, int], int], ...]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]


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

    `tokenizer` is the SHA-256 of the tokenizer.json that made the tokens.
    """

    length: int
    vocab: int
    end: int
    tokenizer: str
    token_bytes: tuple[int, ...]


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


def encode(features: Features, columns: Columns) -> Arrays:
    """The arrays of `input_of(features)`, from columns as `to_columns` and `parse_instances` give.

    Those of images are (N, height, width, channels) in 0..255. Those of a table are NUMBERS,
    float64 (N, numeric columns) with NaN where missing, and objects for each other column: str, or
    None where missing. A series is an object: float32 (length, channels) with NaN where missing.
    Tokens are (N, length) or, of single texts, objects: the ids of each.
    """
    match features:
        case ImageFeatures():
            return (_encode_image(features, columns[IMAGE]),)
        case SeriesFeatures():
            return _encode_series(features, columns[SERIES])
        case BlockFeatures():
            return (columns[TOKENS].astype(np.int64),)
        case TextFeatures():
            return _pad(columns[TOKENS])
        case TableFeatures():
            inputs = _encode_table(features, columns)
            return (_encode_ids(features, columns), inputs) if features.ids else (inputs,)


def encode_targets(output: Output, columns: Columns) -> NDArray[Any]:
    """The targets of `output`: (N,) or, of numbers, (N, names) from the column `label`.

    What follows a token is in the tokens themselves, (N, length).
    """
    if isinstance(output, NextToken):
        return columns[TOKENS].astype(np.int64)
    label = columns["label"]
    if isinstance(output, Numbers):
        numbers = label.reshape(len(label), len(output.names))
        return np.asarray((numbers - output.mean) / np.array(output.std), np.float32)
    return label.astype(np.int64)


def parse_instances(features: Features, instances: list[object]) -> Columns:
    """The columns that `encode` takes, from the JSON values of a request.

    An image is a nested list of numbers in 0..255 (height x width, and x channels if there are
    several) or {"b64": a PNG or JPEG file}; a table row is an object of column: value; a series is
    a list of steps, each a list of a number, or null, per channel (or one, not a list, if there is
    one channel). A text, or {"text": a text}, becomes the column `text`: who has the tokenizer
    makes `tokens` of it.

    Raises:
        FieldError: a value that the model cannot take, by its path.
    """
    if not isinstance(instances, list) or not instances:
        raise FieldError("instances", "must be a list of at least one instance")
    match features:
        case ImageFeatures():
            return {IMAGE: _parse_images(features, instances)}
        case SeriesFeatures():
            return {SERIES: stack_series(_parse_all_series(features, instances))}
        case TextFeatures():
            texts = [_parse_document(text, f"instances[{i}]") for i, text in enumerate(instances)]
            return {TEXT: np.array(texts, dtype=object)}
        case BlockFeatures():
            raise FieldError("instances", "cannot be given: a language model is asked otherwise")
    return _parse_rows(features, instances)


def decode_image(
    data: bytes, height: int, width: int, channels: int, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """The pixels (height, width, channels) of a PNG or JPEG file, upright, centre-cropped.

    Raises:
        ValueError: not a PNG or JPEG file, a broken one, or one of more than `max_pixels`.
    """
    try:
        with open_image(data, max_pixels) as image:
            return fit_image(ImageOps.exif_transpose(image), height, width, channels)
    except BROKEN_IMAGE as error:
        raise ValueError(f"not a readable PNG or JPEG file: {_first_line(error)}") from error


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A PNG or JPEG file of a bounded size with only its header read; raises BROKEN_IMAGE."""
    image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.width}x{image.height} is more than {max_pixels:,} pixels")
    return image


def fit_image(image: Image.Image, height: int, width: int, channels: int) -> NDArray[np.uint8]:
    """Pixels (height, width, channels): scaled until the shorter side fits, then centre-cropped."""
    flat = _flatten(image).convert(MODES[channels])
    if flat.size != (width, height):
        flat = ImageOps.fit(flat, (width, height), Image.Resampling.BILINEAR)
    return np.asarray(flat, dtype=np.uint8).reshape(height, width, channels)


def clean_text(value: str) -> str | None:
    """`value` without surrounding blanks, or None if it is one of the words for "missing"."""
    stripped = value.strip()
    return None if stripped in MISSING_TEXTS else stripped


def parse_number(text: str) -> float | None:
    """`text` as a number of at most MAX_NUMBER, None if it is not one."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) <= MAX_NUMBER and "_" not in text else None


def shorten_number(text: str) -> str:
    """A whole number without its decimal point, so that 5 and 5.0 are one label or id."""
    match = WHOLE_NUMBER.fullmatch(text)
    return match[1] if match else text


def write_number(value: float) -> str:
    """The shortest text of a number, a whole one without a decimal point."""
    return str(int(value)) if value % 1 == 0 else repr(value)


def _flatten(image: Image.Image) -> Image.Image:
    """Without transparency (on white, as a browser shows it) and with 8 bits per channel."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode not in ("LA", "PA", "RGBA") and "transparency" not in image.info:
        return image
    layered = image.convert("RGBA")
    white = Image.new("RGBA", layered.size, "white")
    return Image.alpha_composite(white, layered).convert("RGB")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].split(" <_io")[0]


def _encode_image(features: ImageFeatures, pixels: NDArray[Any]) -> NDArray[np.float32]:
    mean, std = np.array(features.mean), np.array(features.std)
    scale, shift = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
    normal = pixels.astype(np.float32) * scale + shift
    return np.ascontiguousarray(normal.transpose(0, 3, 1, 2))


def _pad(rows: NDArray[Any]) -> Arrays:
    """Token ids (N, T), 0 after the end of a row, and the lengths (N,)."""
    lengths = np.fromiter(map(len, rows), np.int64, count=len(rows))
    padded = np.zeros((len(rows), lengths.max(initial=1)), np.int64)
    if len(rows):
        padded[np.arange(padded.shape[1]) < lengths[:, np.newaxis]] = np.concatenate(rows)
    return padded, lengths


def _encode_series(features: SeriesFeatures, rows: NDArray[Any]) -> Arrays:
    """Zero, after standardising, is what stands where a value is missing or a row has ended."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    inputs = np.zeros((len(rows), lengths.max(initial=1), features.channels), np.float32)
    mean, std = np.array(features.mean, np.float64), np.array(features.std, np.float64)
    for row, values in enumerate(rows):
        inputs[row, : len(values)] = _standardise(values, mean, std)
    return inputs, lengths


def stack_series(rows: Sequence[NDArray[np.float32]]) -> NDArray[Any]:
    """Series of any lengths as one array of objects, as `encode` takes them."""
    stacked = np.empty(len(rows), object)
    for index, row in enumerate(rows):
        stacked[index] = row
    return stacked


def _standardise(
    values: NDArray[Any], mean: NDArray[np.float64], std: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Deviations of the last axis, 0 where a value is missing."""
    with np.errstate(over="ignore"):
        deviations = ((values - mean) / std).clip(-MAX_DEVIATIONS, MAX_DEVIATIONS)
    deviations[np.isnan(deviations)] = 0.0
    return cast(NDArray[np.float64], deviations)


def _assign_slots(features: TableFeatures) -> Slots:
    """Inputs in the order of the columns; an id has none here, it is looked up instead."""
    numbers: list[int] = []
    flagged, flags, categories, width = [], [], [], 0
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
    return Slots(
        width,
        np.array(numbers, np.intp),
        np.array(flagged, np.intp),
        np.array(flags, np.intp),
        tuple(categories),
        np.array([column.mean for column in features.numeric], np.float64),
        np.array([column.std for column in features.numeric], np.float64),
    )


def _encode_table(features: TableFeatures, columns: Columns) -> NDArray[np.float32]:
    slots = features.slots
    rows = _count_rows(features, columns)
    inputs = np.zeros((rows, slots.width), np.float32)
    if features.numeric:
        numbers = columns[NUMBERS]
        inputs[:, slots.numbers] = _standardise(numbers, slots.mean, slots.std)
        inputs[:, slots.flags] = np.isnan(numbers[:, slots.flagged])
    for name, places, other in slots.categories:
        inputs[np.arange(rows), _look_up(places, columns[name], other)] = 1
    return inputs


def _encode_ids(features: TableFeatures, columns: Columns) -> NDArray[np.int64]:
    found = [
        _look_up(column.places, columns[COLUMN_PREFIX + column.name], 0) for column in features.ids
    ]
    return np.stack(found, axis=1)


def _look_up(places: dict[Any, int], values: NDArray[Any], other: int) -> NDArray[np.int64]:
    """A hash table outruns a binary search and Arrow's `index_in`, which builds one every time."""
    return np.fromiter(map(places.get, values, repeat(other)), np.int64, len(values))


def _count_rows(features: TableFeatures, columns: Columns) -> int:
    if not features.columns:
        return 0
    column = features.columns[0]
    is_number = isinstance(column, NumericColumn)
    return len(columns[NUMBERS if is_number else COLUMN_PREFIX + column.name])


def _parse_images(features: ImageFeatures, instances: list[object]) -> NDArray[Any]:
    paths = [f"instances[{index}]" for index in range(len(instances))]
    given = [
        _read_file(instance, path) if isinstance(instance, dict) else instance
        for instance, path in zip(instances, paths, strict=True)
    ]
    pixels = sum(_count_pixels(file) for file in given if isinstance(file, bytes))
    if pixels > MAX_REQUEST_PIXELS:
        raise FieldError(
            "instances",
            f"have {pixels:,} pixels, a request may have {MAX_REQUEST_PIXELS:,}: send fewer images "
            "at once, or smaller ones",
        )
    return np.stack([_parse_image(features, *pair) for pair in zip(given, paths, strict=True)])


def _parse_image(features: ImageFeatures, given: object, path: str) -> NDArray[Any]:
    height, width, channels = features.height, features.width, features.channels
    if isinstance(given, bytes):
        try:
            return decode_image(given, height, width, channels, MAX_SERVED_PIXELS)
        except ValueError as error:
            raise FieldError(f"{path}.b64", f"is {error}") from error
    _check_pixels(given, (height, width) if channels == 1 else (height, width, channels), path)
    return np.array(given, dtype=np.float32).reshape(height, width, channels)


def _read_file(instance: dict[str, object], path: str) -> bytes:
    text = instance.get("b64")
    if set(instance) != {"b64"} or not isinstance(text, str):
        raise FieldError(path, 'must be {"b64": "..."}, a PNG or JPEG file in base64')
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise FieldError(f"{path}.b64", f"is not base64: {error}") from error


def _count_pixels(file: bytes) -> int:
    """Width x height of an image by its header; 0 of one that is refused for itself."""
    try:
        with open_image(file, MAX_SERVED_PIXELS) as image:
            return image.width * image.height
    except BROKEN_IMAGE:
        return 0


def _check_pixels(value: object, shape: tuple[int, ...], path: str) -> None:
    if not isinstance(value, list) or len(value) != shape[0]:
        size = " x ".join(map(str, shape))
        raise FieldError(path, f"must be a list of {size} numbers, or an image file as b64")
    if len(shape) > 1:
        for index, part in enumerate(value):
            _check_pixels(part, shape[1:], f"{path}[{index}]")
    elif not all(type(pixel) in (int, float) and 0 <= pixel <= 255 for pixel in value):
        index = next(i for i, pixel in enumerate(value) if not _is_pixel(pixel))
        raise FieldError(f"{path}[{index}]", "must be a number in 0..255")


def _is_pixel(value: object) -> bool:
    return type(value) in (int, float) and 0 <= cast(float, value) <= 255


def _parse_document(instance: object, path: str) -> str:
    if isinstance(instance, dict) and set(instance) == {"text"}:
        instance, path = instance["text"], f"{path}.text"
    if not isinstance(instance, str):
        raise FieldError(path, 'must be a text, or {"text": a text}')
    if not instance.strip():
        raise FieldError(path, "must not be empty")
    return instance


def _parse_all_series(
    features: SeriesFeatures, instances: list[object]
) -> list[NDArray[np.float32]]:
    return [
        _parse_series(features, instance, f"instances[{index}]")
        for index, instance in enumerate(instances)
    ]


def _parse_series(features: SeriesFeatures, instance: object, path: str) -> NDArray[np.float32]:
    if not isinstance(instance, list) or not 0 < len(instance) <= features.length:
        raise FieldError(path, f"must be a list of 1 to {features.length:,} steps")
    for index, step in enumerate(instance):
        _check_step(step, features.channels, f"{path}[{index}]")
    return np.array(instance, np.float32).reshape(len(instance), features.channels)


def _check_step(step: object, channels: int, path: str) -> None:
    if channels == 1 and not isinstance(step, list):
        step = [step]
    if not isinstance(step, list) or len(step) != channels:
        raise FieldError(path, f"must be a list of {channels} numbers, one per channel")
    for index, value in enumerate(step):
        if value is not None and not _is_number(value, MAX_FLOAT32):
            raise FieldError(f"{path}[{index}]", f"must be a number of at most {MAX_FLOAT32:g}")


def _parse_rows(features: TableFeatures, instances: list[object]) -> Columns:
    for index, instance in enumerate(instances):
        _check_row(features, instance, f"instances[{index}]")
    rows = cast(list[dict[str, object]], instances)
    texts = {
        COLUMN_PREFIX + column.name: _parse_texts(column, [row.get(column.name) for row in rows])
        for column in features.columns
        if not isinstance(column, NumericColumn)
    }
    return {NUMBERS: _parse_numbers(features.numeric, rows), **texts}


def _check_row(features: TableFeatures, instance: object, path: str) -> None:
    if not isinstance(instance, dict):
        raise FieldError(path, "must be an object of column: value")
    for name in instance:
        if name not in features.names:
            names = [column.name for column in features.columns]
            listed = ", ".join(names[:MAX_LISTED]) + ", ..." * (len(names) > MAX_LISTED)
            raise FieldError(f"{path}.{name}", f"is unknown, the columns are {listed}")


def _parse_numbers(
    columns: tuple[NumericColumn, ...], rows: list[dict[str, object]]
) -> NDArray[np.float64]:
    """(rows, columns) with NaN where missing."""
    numbers = np.empty((len(rows), len(columns)), np.float64)
    for index, row in enumerate(rows):
        values: list[Any] = [row.get(column.name) for column in columns]
        numbers[index] = [value if _is_number(value) else math.nan for value in values]
    for index, place in np.argwhere(np.isnan(numbers)):
        column = columns[place]
        path = f"instances[{index}].{column.name}"
        _check_missing(column, rows[index].get(column.name), path)
    return numbers


def _check_missing(column: NumericColumn, value: object, path: str) -> None:
    if value is not None:
        raise FieldError(path, f"must be a number of at most {MAX_NUMBER:g}")
    if not column.has_missing:
        raise FieldError(path, "is required: training saw no row without it")


def _is_number(value: object, most: float = MAX_NUMBER) -> bool:
    return type(value) in (int, float) and abs(cast(float, value)) <= most


def _parse_texts(column: CategoryColumn | IdColumn, values: list[object]) -> NDArray[Any]:
    parse = _parse_id if isinstance(column, IdColumn) else _parse_text
    parsed = np.empty(len(values), object)
    parsed[:] = [
        parse(column, value, f"instances[{index}].{column.name}")
        for index, value in enumerate(values)
    ]
    return parsed


def _parse_text(column: CategoryColumn | IdColumn, value: object, path: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        example = f', as "{column.values[0]}"' if column.values else ""
        raise FieldError(path, f"must be a string{example}")
    return clean_text(value)


def _parse_id(column: CategoryColumn | IdColumn, value: object, path: str) -> str | None:
    """The same text for 5, 5.0 and "5"; None, which is as good as unseen, where it is missing."""
    if value is None:
        return None
    if isinstance(value, str):
        text = clean_text(value)
        return text and shorten_number(text)
    if not _is_number(value):
        raise FieldError(path, "must be a string or a number")
    return write_number(cast(float, value))
