"""Rows as a model's arrays: the one code that applies `features`, in training and serving."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from heliostat.data.features import (
    COLUMN_PREFIX,
    IMAGE,
    NUMBERS,
    SERIES,
    TOKENS,
    BlockFeatures,
    Columns,
    Features,
    ImageFeatures,
    NumericColumn,
    SeriesFeatures,
    TableFeatures,
    TextFeatures,
)
from heliostat.signature import NextToken, Numbers, Output

MAX_DEVIATIONS = 1e6  # so that any number is one in 32 bits, and stays one in a model

Arrays = tuple[NDArray[Any], ...]


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


def stack_series(rows: Sequence[NDArray[np.float32]]) -> NDArray[Any]:
    """Series of any lengths as one array of objects, as `encode` takes them."""
    stacked = np.empty(len(rows), object)
    for index, row in enumerate(rows):
        stacked[index] = row
    return stacked


def _encode_image(features: ImageFeatures, pixels: NDArray[Any]) -> NDArray[np.float32]:
    scale, shift = _find_scale(features)
    normal = np.multiply(pixels, scale, dtype=np.float32)
    normal += shift
    return np.ascontiguousarray(normal.transpose(0, 3, 1, 2))


@lru_cache(64)
def _find_scale(features: ImageFeatures) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """By channel: what a pixel is multiplied by, and what is added then."""
    mean, std = np.array(features.mean), np.array(features.std)
    return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)


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


def _standardise(
    values: NDArray[Any], mean: NDArray[np.float64], std: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Deviations of the last axis, 0 where a value is missing."""
    with np.errstate(over="ignore"):
        deviations = ((values - mean) / std).clip(-MAX_DEVIATIONS, MAX_DEVIATIONS)
    deviations[np.isnan(deviations)] = 0.0
    return cast(NDArray[np.float64], deviations)


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
