"""How a model sees a row: statistics of the training split, and the one code that applies them."""

import base64
import binascii
import io
import math
import struct
import zlib
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from heliostat.errors import HeliostatError
from heliostat.signature import Blocks, Input, NextToken, Numbers, Output, Picture, Text, Vector

Columns = dict[str, NDArray[Any]]
Arrays = tuple[NDArray[Any], ...]

IMAGE = "image"
TOKENS = "tokens"
TEXT = "text"
MAX_PIXELS = 64_000_000
MAX_NUMBER = 1e100  # so that squares and their sums are numbers too
MAX_DEVIATIONS = 1e6  # so that any number is one in 32 bits, and stays one in a model
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
class TableFeatures:
    columns: tuple[NumericColumn | CategoryColumn, ...]


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


Features = ImageFeatures | TableFeatures | BlockFeatures | TextFeatures


def features_to_json(features: Features) -> dict[str, Any]:
    """The features as plain JSON values; many numbers of tokens as base64 of 16 bits each."""
    match features:
        case ImageFeatures():
            return {"kind": "image", **asdict(features)}
        case BlockFeatures():
            sizes = base64.b64encode(np.array(features.token_bytes, "<u2").tobytes()).decode()
            return {"kind": "blocks", **asdict(features), "token_bytes": sizes}
        case TextFeatures():
            return {"kind": "text", **asdict(features)}
    return {
        "kind": "table",
        "columns": [
            {"kind": "numeric" if isinstance(column, NumericColumn) else "category"}
            | asdict(column)
            for column in features.columns
        ],
    }


def features_from_json(document: dict[str, Any]) -> Features:
    """The inverse of `features_to_json`."""
    fields = dict(document)
    match fields.pop("kind"):
        case "table":
            return TableFeatures(tuple(map(_column_from_json, fields["columns"])))
        case "blocks":
            sizes = np.frombuffer(base64.b64decode(fields["token_bytes"]), "<u2")
            return BlockFeatures(**fields | {"token_bytes": tuple(sizes.tolist())})
        case "text":
            return TextFeatures(**fields)
    return ImageFeatures(**fields | {"mean": tuple(fields["mean"]), "std": tuple(fields["std"])})


def _column_from_json(document: dict[str, Any]) -> NumericColumn | CategoryColumn:
    fields = dict(document)
    if fields.pop("kind") == "numeric":
        return NumericColumn(**fields)
    return CategoryColumn(fields["name"], tuple(fields["values"]))


def input_of(features: Features) -> Input:
    """What a network gets of a row."""
    match features:
        case ImageFeatures():
            return Picture(features.channels, features.height, features.width)
        case BlockFeatures():
            return Blocks(features.length, features.vocab, features.end)
        case TextFeatures():
            return Text(features.length, features.vocab)
    return Vector(sum(map(_column_width, features.columns)))


def token_type(vocab: int) -> type[np.uint16] | type[np.int32]:
    """How shards store tokens: in the smaller of the two types that holds them."""
    return np.uint16 if vocab <= 2**16 else np.int32


def encode(features: Features, columns: Columns) -> Arrays:
    """The arrays of `input_of(features)`, from columns as the shards hold them.

    An image column is (N, height, width, channels) in 0..255, a numeric column float64 with NaN
    where missing, a category column objects: str, or None where missing. Tokens are (N, length) or,
    of single texts, objects: an array of ids each.
    """
    match features:
        case ImageFeatures():
            return (_encode_image(features, columns[IMAGE]),)
        case BlockFeatures():
            return (columns[TOKENS].astype(np.int64),)
        case TextFeatures():
            return _pad(columns[TOKENS])
    blocks = [_encode_column(column, columns[column.name]) for column in features.columns]
    return (np.concatenate(blocks, axis=1),)


def encode_targets(output: Output, columns: Columns) -> NDArray[Any]:
    """The targets of `output`: (N,) or, of numbers, (N, names) from the column `label`.

    What follows a token is in the tokens themselves, (N, length).
    """
    if isinstance(output, NextToken):
        return columns[TOKENS].astype(np.int64)
    label = columns["label"]
    if isinstance(output, Numbers):
        return np.asarray((label - output.mean) / np.array(output.std), np.float32)
    return label.astype(np.int64)


def parse_instances(features: Features, instances: list[object]) -> Columns:
    """The columns that `encode` takes, from the JSON values of a request.

    An image is a nested list of numbers in 0..255 (height x width, and x channels if there are
    several) or {"b64": a PNG or JPEG file}; a table row is an object of column: value. A text, or
    {"text": a text}, becomes the column `text`: who has the tokenizer makes `tokens` of it.

    Raises:
        FieldError: a value that the model cannot take, by its path.
    """
    if not isinstance(instances, list) or not instances:
        raise FieldError("instances", "must be a list of at least one instance")
    match features:
        case ImageFeatures():
            return {IMAGE: _parse_images(features, instances)}
        case TextFeatures():
            texts = [_parse_document(text, f"instances[{i}]") for i, text in enumerate(instances)]
            return {TEXT: np.array(texts, dtype=object)}
        case BlockFeatures():
            raise FieldError("instances", "cannot be given: a language model is asked otherwise")
    return _parse_rows(features, instances)


def decode_image(data: bytes, height: int, width: int, channels: int) -> NDArray[np.uint8]:
    """The pixels (height, width, channels) of a PNG or JPEG file, upright, centre-cropped.

    Raises:
        ValueError: not a PNG or JPEG file, a broken one, or one of more than 64 million pixels.
    """
    try:
        with open_image(data) as image:
            return fit_image(ImageOps.exif_transpose(image), height, width, channels)
    except BROKEN_IMAGE as error:
        raise ValueError(f"not a readable PNG or JPEG file: {_first_line(error)}") from error


def open_image(data: bytes) -> Image.Image:
    """A PNG or JPEG file of a bounded size with only its header read; raises BROKEN_IMAGE."""
    image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS:,} pixels")
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


def _column_width(column: NumericColumn | CategoryColumn) -> int:
    if isinstance(column, NumericColumn):
        return 1 + column.has_missing
    return len(column.values) + 1


def _encode_column(
    column: NumericColumn | CategoryColumn, values: NDArray[Any]
) -> NDArray[np.float32]:
    if isinstance(column, NumericColumn):
        return _encode_numbers(column, values)
    return _encode_texts(column, values)


def _encode_numbers(column: NumericColumn, values: NDArray[Any]) -> NDArray[np.float32]:
    missing = np.isnan(values)
    with np.errstate(over="ignore"):
        deviations = ((values - column.mean) / column.std).clip(-MAX_DEVIATIONS, MAX_DEVIATIONS)
    normal = np.where(missing, 0.0, deviations)
    inputs = [normal, missing] if column.has_missing else [normal]
    return np.stack(inputs, axis=1).astype(np.float32)


def _encode_texts(column: CategoryColumn, values: NDArray[Any]) -> NDArray[np.float32]:
    slots: dict[str | None, int] = {value: slot for slot, value in enumerate(column.values)}
    hot = [slots.get(value, len(slots)) for value in values]
    return np.eye(len(slots) + 1, dtype=np.float32)[hot]


def _parse_images(features: ImageFeatures, instances: list[object]) -> NDArray[Any]:
    images = [
        _parse_image(features, instance, f"instances[{index}]")
        for index, instance in enumerate(instances)
    ]
    return np.stack(images)


def _parse_image(features: ImageFeatures, instance: object, path: str) -> NDArray[Any]:
    height, width, channels = features.height, features.width, features.channels
    if isinstance(instance, dict):
        return _parse_file(features, instance, path)
    _check_pixels(instance, (height, width) if channels == 1 else (height, width, channels), path)
    return np.array(instance, dtype=np.float32).reshape(height, width, channels)


def _parse_file(features: ImageFeatures, instance: dict[str, object], path: str) -> NDArray[Any]:
    text = instance.get("b64")
    if set(instance) != {"b64"} or not isinstance(text, str):
        raise FieldError(path, 'must be {"b64": "..."}, a PNG or JPEG file in base64')
    try:
        data = base64.b64decode(text, validate=True)
        return decode_image(data, features.height, features.width, features.channels)
    except binascii.Error as error:
        raise FieldError(f"{path}.b64", f"is not base64: {error}") from error
    except ValueError as error:
        raise FieldError(f"{path}.b64", f"is {error}") from error


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


def _parse_rows(features: TableFeatures, instances: list[object]) -> Columns:
    for index, instance in enumerate(instances):
        _check_row(features, instance, f"instances[{index}]")
    rows = cast(list[dict[str, object]], instances)
    return {
        column.name: _parse_column(column, [row.get(column.name) for row in rows])
        for column in features.columns
    }


def _check_row(features: TableFeatures, instance: object, path: str) -> None:
    if not isinstance(instance, dict):
        raise FieldError(path, "must be an object of column: value")
    names = [column.name for column in features.columns]
    for name in instance:
        if name not in names:
            raise FieldError(f"{path}.{name}", f"is unknown, the columns are {', '.join(names)}")


def _parse_column(column: NumericColumn | CategoryColumn, values: list[object]) -> NDArray[Any]:
    paths = [f"instances[{index}].{column.name}" for index in range(len(values))]
    pairs = zip(values, paths, strict=True)
    if isinstance(column, NumericColumn):
        return np.array([_parse_float(column, *pair) for pair in pairs], dtype=np.float64)
    return np.array([_parse_text(column, *pair) for pair in pairs], dtype=object)


def _parse_float(column: NumericColumn, value: object, path: str) -> float:
    if value is None and column.has_missing:
        return math.nan
    if value is None:
        raise FieldError(path, "is required: training saw no row without it")
    if type(value) not in (int, float) or not abs(cast(float, value)) <= MAX_NUMBER:
        raise FieldError(path, f"must be a number of at most {MAX_NUMBER:g}")
    return float(cast(float, value))


def _parse_text(column: CategoryColumn, value: object, path: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        example = f', as "{column.values[0]}"' if column.values else ""
        raise FieldError(path, f"must be a string{example}")
    return clean_text(value)
