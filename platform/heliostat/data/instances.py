"""The JSON values of a request as columns, each refused by its path if it does not fit."""

import base64
import math
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from heliostat.data.cells import MAX_NUMBER, is_number, shorten_number, strip_text, write_number
from heliostat.data.encoding import stack_series
from heliostat.data.features import (
    COLUMN_PREFIX,
    IMAGE,
    NUMBERS,
    SERIES,
    TEXT,
    BlockFeatures,
    CategoryColumn,
    Columns,
    Features,
    IdColumn,
    ImageFeatures,
    NumericColumn,
    SeriesFeatures,
    TableFeatures,
    TextFeatures,
)
from heliostat.data.nested import NUMBERS_OR_NULL, are_all_pixels, read_numbers, scan_numbers
from heliostat.data.pixels import BROKEN_IMAGE, decode_image, open_image
from heliostat.errors import HeliostatError

MAX_SERVED_PIXELS = 25_000_000  # of an image in a request; a file of 8 KB can have more
MAX_REQUEST_PIXELS = 64_000_000  # of all of them: about a second of one core

MAX_FLOAT32 = float(np.finfo(np.float32).max)

MAX_LISTED = 20


class FieldError(HeliostatError):
    """A value in a request that the model cannot take; `field` is its path, `instances[3].age`."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field = field


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


def scan_images(features: ImageFeatures, text: bytes) -> NDArray[Any] | None:
    """The same pixels from JSON that is a list of images, all of them numbers in 0..255.

    None if it is anything else, which `parse_instances` may still take.
    """
    height, width, channels = features.height, features.width, features.channels
    numbers = scan_numbers(text, (height, width) if channels == 1 else (height, width, channels))
    if numbers is None:
        return None
    try:
        pixels: NDArray[Any] = np.frombuffer(bytes(cast(list[int], numbers)), np.uint8)
    except ValueError:
        return None
    except TypeError:  # not only whole numbers
        exact = np.array(numbers, np.float64)
        if not are_all_pixels(exact):
            return None
        pixels = exact.astype(np.float32)
    return pixels.reshape(-1, height, width, channels)


def _parse_images(features: ImageFeatures, instances: list[object]) -> NDArray[Any]:
    height, width, channels = features.height, features.width, features.channels
    pixels = read_numbers(instances)
    if (
        pixels is not None
        and pixels.shape[1:] == ((height, width) if channels == 1 else (height, width, channels))
        and are_all_pixels(pixels)
    ):
        return pixels.astype(np.float32).reshape(-1, height, width, channels)
    return _parse_each_image(features, instances)


def _parse_each_image(features: ImageFeatures, instances: list[object]) -> NDArray[Any]:
    """Files among them, or a value that is wrong and gets a name."""
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
    values = read_numbers(instance, NUMBERS_OR_NULL)
    if values is None or not _fits(values, features.channels):
        for index, step in enumerate(instance):
            _check_step(step, features.channels, f"{path}[{index}]")
        steps = [step if isinstance(step, list) else [step] for step in instance]
        values = np.array(steps, np.float64)
    return values.astype(np.float32).reshape(len(instance), features.channels)


def _fits(values: NDArray[np.float64], channels: int) -> bool:
    is_shaped = values.shape[1:] == (channels,) or (channels == 1 and values.ndim == 1)
    return is_shaped and not (abs(values) > MAX_FLOAT32).any()


def _check_step(step: object, channels: int, path: str) -> None:
    if channels == 1 and not isinstance(step, list):
        step = [step]
    if not isinstance(step, list) or len(step) != channels:
        raise FieldError(path, f"must be a list of {channels} numbers, one per channel")
    for index, value in enumerate(step):
        if value is not None and not is_number(value, MAX_FLOAT32):
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
    return {NUMBERS: _parse_numbers(features, rows), **texts}


def _check_row(features: TableFeatures, instance: object, path: str) -> None:
    if not isinstance(instance, dict):
        raise FieldError(path, "must be an object of column: value")
    if instance.keys() <= features.names:
        return
    for name in instance:
        if name not in features.names:
            names = [column.name for column in features.columns]
            listed = ", ".join(names[:MAX_LISTED]) + ", ..." * (len(names) > MAX_LISTED)
            raise FieldError(f"{path}.{name}", f"is unknown, the columns are {listed}")


def _parse_numbers(features: TableFeatures, rows: list[dict[str, object]]) -> NDArray[np.float64]:
    """(rows, columns) with NaN where missing."""
    values: list[list[Any]] = [list(map(row.get, features.numeric_names)) for row in rows]
    numbers = read_numbers(values, NUMBERS_OR_NULL)
    if numbers is None or numbers.ndim > 2 or (abs(numbers) > MAX_NUMBER).any():
        kept = [[value if is_number(value) else math.nan for value in row] for row in values]
        numbers = np.array(kept, np.float64)
    for index, place in np.argwhere(np.isnan(numbers)):
        column = features.numeric[place]
        path = f"instances[{index}].{column.name}"
        _check_missing(column, rows[index].get(column.name), path)
    return numbers


def _check_missing(column: NumericColumn, value: object, path: str) -> None:
    if value is not None:
        raise FieldError(path, f"must be a number of at most {MAX_NUMBER:g}")
    if not column.has_missing:
        raise FieldError(path, "is required: training saw no row without it")


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
    return strip_text(value)


def _parse_id(column: CategoryColumn | IdColumn, value: object, path: str) -> str | None:
    """The same text for 5, 5.0 and "5"; None, which is as good as unseen, where it is missing."""
    if value is None:
        return None
    if isinstance(value, str):
        text = strip_text(value)
        return text and shorten_number(text)
    if not is_number(value):
        raise FieldError(path, "must be a string or a number")
    return write_number(cast(float, value))
