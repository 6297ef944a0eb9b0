"""The tensors that a version takes and gives, one row of a table for each kind of features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heliostat.data.cells import MAX_NUMBER, shorten_number, strip_text, write_number
from heliostat.data.encoding import stack_series
from heliostat.data.features import (
    COLUMN_PREFIX,
    IMAGE,
    NUMBERS,
    SERIES,
    TEXT,
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
from heliostat.data.instances import MAX_FLOAT32
from heliostat.data.nested import are_all_pixels, are_pixels, find_first
from heliostat.serve.protocol import MAX_INSTANCES
from heliostat.serve.replies import Refusal
from heliostat.serve.tensors import BYTES, Answer, Tensor
from heliostat.signature import Classes, Numbers, Output

ANY = -1  # a size that the request chooses
MAX_LISTED = 20
PROBABILITIES, CLASS = "probabilities", "class"


@dataclass(frozen=True)
class Slot:
    """A tensor by name; its first size, the rows, is ANY."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


@dataclass(frozen=True)
class Kind:
    """What `features` take, and the columns for `predict` of tensors that have these shapes."""

    slots: Callable[[Any], tuple[Slot, ...]]
    to_columns: Callable[[Any, dict[str, Tensor]], Columns]


def list_inputs(features: Features) -> tuple[Slot, ...]:
    """Numbers may be sent in any numeric type, the one that is named is what training saw."""
    kind = KINDS.get(type(features))
    return kind.slots(features) if kind else ()


def list_outputs(output: Output) -> tuple[Slot, ...]:
    match output:
        case Classes(labels):
            return (
                Slot(PROBABILITIES, "FP32", (ANY, len(labels))),
                Slot(CLASS, BYTES, (ANY,)),
            )
        case Numbers(names):
            return tuple(Slot(name, "FP32", (ANY,)) for name in names)
        case _:
            return ()


class Interface:
    """What a version takes and gives, laid out once for all of its requests."""

    def __init__(self, features: Features, output: Output) -> None:
        self.features, self.output = features, output
        self.inputs = {slot.name: slot for slot in list_inputs(features)}
        self.outputs = {slot.name: slot for slot in list_outputs(output)}
        self._required = self.inputs.keys() - _list_optional(features)
        self._kind = KINDS.get(type(features))
        self._labels = np.array(output.labels if isinstance(output, Classes) else (), object)
        self._places = {name: place for place, name in enumerate(self.outputs)}

    def read(self, tensors: Sequence[Tensor]) -> Columns:
        """The rows of a request as columns.

        Raises:
            Refusal: 422, a tensor is missing, too much, or has a shape, a type or a value that the
                model cannot take; 422 as well for a language model, which is asked otherwise.
        """
        if self._kind is None:
            raise Refusal(422, "a language model continues texts, it has no tensors", "inputs")
        given = {tensor.name: tensor for tensor in tensors}
        for name, tensor in given.items():
            if name not in self.inputs:
                listed = ", ".join(list(self.inputs)[:MAX_LISTED])
                raise tensor.refuse("name", f"is unknown, the inputs are {listed}")
            _check_tensor(self.inputs[name], tensor)
        if not given.keys() >= self._required:
            name = next(name for name in self.inputs if name in self._required - given.keys())
            raise Refusal(422, f"the input {name!r:.80} is missing", "inputs")
        _check_rows(tensors)
        return self._kind.to_columns(self.features, given)

    def write(self, name: str, values: NDArray[np.float32]) -> Answer:
        """The tensor `name` of the outputs; `values` are (N, classes or numbers)."""
        datatype = self.outputs[name].datatype
        if not isinstance(self.output, Classes):
            return Answer(name, datatype, values[:, self._places[name]])
        chosen = self._labels[values.argmax(axis=1)] if name == CLASS else values
        return Answer(name, datatype, chosen)


def classify(output: Output, answer: Answer, most: int) -> Answer:
    """The `most` probable classes of each row as texts "probability:number:label".

    Raises:
        Refusal: 422, it is another output than the probabilities.
    """
    if not isinstance(output, Classes) or answer.name != PROBABILITIES:
        raise Refusal(422, f"classification is for {PROBABILITIES} of classes", "outputs")
    best = (-answer.values).argsort(axis=1, kind="stable")[:, :most]
    texts = np.empty(best.shape, object)
    for (row, place), number in np.ndenumerate(best):
        texts[row, place] = f"{answer.values[row, number]:f}:{number}:{output.labels[number]}"
    return Answer(answer.name, BYTES, texts)


def _check_tensor(slot: Slot, tensor: Tensor) -> None:
    shape = tensor.values.shape
    if shape[1:] != slot.shape[1:] and not _fits(shape, slot.shape):
        raise tensor.refuse("shape", f"is {list(shape)}, it must be {list(slot.shape)}")
    if slot.datatype != BYTES and tensor.datatype == BYTES:
        raise tensor.refuse("datatype", f"is {BYTES}, it must be numbers, as {slot.datatype}")


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        most in (ANY, size) for size, most in zip(shape, wanted, strict=True)
    )


def _check_rows(tensors: Sequence[Tensor]) -> None:
    first, *others = tensors
    rows = len(first.values)
    if not 1 <= rows <= MAX_INSTANCES:
        raise first.refuse("shape", f"has {rows:,} rows, there must be 1 to {MAX_INSTANCES:,}")
    for other in others:
        if len(other.values) != rows:
            raise other.refuse(
                "shape", f"has {len(other.values):,} rows, {first.name!r:.80} {rows:,}"
            )


def _list_optional(features: Features) -> set[str]:
    """The columns of a table that can be left out, as in a JSON row."""
    columns = features.columns if isinstance(features, TableFeatures) else ()
    return {
        column.name
        for column in columns
        if not isinstance(column, NumericColumn) or column.has_missing
    }


def _check_values(tensor: Tensor, good: NDArray[np.bool_], needed: str) -> None:
    if not good.all():
        place = ", ".join(map(str, find_first(~good)))
        raise tensor.refuse(f"data[{place}]", f"must be {needed}")


# --- Images --------------------------------------------------------------------------------------


def _image_slots(features: ImageFeatures) -> tuple[Slot, ...]:
    return (Slot(IMAGE, "UINT8", (ANY, features.height, features.width, features.channels)),)


def _image_columns(features: ImageFeatures, tensors: dict[str, Tensor]) -> Columns:
    tensor = tensors[IMAGE]
    if tensor.datatype != "UINT8" and not are_all_pixels(tensor.values):
        _check_values(tensor, are_pixels(tensor.values), "a number in 0..255")
    return {IMAGE: tensor.values}


# --- Series --------------------------------------------------------------------------------------


def _series_slots(features: SeriesFeatures) -> tuple[Slot, ...]:
    return (Slot(SERIES, "FP32", (ANY, ANY, features.channels)),)


def _series_columns(features: SeriesFeatures, tensors: dict[str, Tensor]) -> Columns:
    """NaN is a missing value; rows of one request are equally long."""
    tensor = tensors[SERIES]
    steps = tensor.values.shape[1]
    if not 1 <= steps <= features.length:
        raise tensor.refuse("shape", f"has {steps:,} steps, there must be 1 to {features.length:,}")
    is_small = ~(abs(tensor.values) > MAX_FLOAT32)
    _check_values(tensor, is_small, f"a number of at most {MAX_FLOAT32:g}")
    return {SERIES: stack_series(list(tensor.values.astype(np.float32)))}


# --- Texts ---------------------------------------------------------------------------------------


def _text_slots(features: TextFeatures) -> tuple[Slot, ...]:
    return (Slot(TEXT, BYTES, (ANY,)),)


def _text_columns(features: TextFeatures, tensors: dict[str, Tensor]) -> Columns:
    tensor = tensors[TEXT]
    if tensor.datatype != BYTES:
        raise tensor.refuse("datatype", f"is {tensor.datatype}, it must be {BYTES}")
    for index, text in enumerate(tensor.values):
        if not text or not text.strip():
            raise tensor.refuse(f"data[{index}]", "must not be empty")
    return {TEXT: tensor.values}


# --- Tables --------------------------------------------------------------------------------------


def _table_slots(features: TableFeatures) -> tuple[Slot, ...]:
    return tuple(
        Slot(column.name, "FP64" if isinstance(column, NumericColumn) else BYTES, (ANY,))
        for column in features.columns
    )


def _table_columns(features: TableFeatures, tensors: dict[str, Tensor]) -> Columns:
    rows = len(next(iter(tensors.values())).values)
    numbers = np.full((rows, len(features.numeric)), np.nan)
    for place, column in enumerate(features.numeric):
        if tensor := tensors.get(column.name):
            numbers[:, place] = _read_numbers(column, tensor)
    columns: Columns = {NUMBERS: numbers}
    for other in features.columns:
        if not isinstance(other, NumericColumn):
            tensor = tensors.get(other.name)
            texts = _read_texts(other, tensor) if tensor else np.full(rows, None, object)
            columns[COLUMN_PREFIX + other.name] = texts
    return columns


def _read_numbers(column: NumericColumn, tensor: Tensor) -> NDArray[Any]:
    missing = np.isnan(tensor.values)
    if not column.has_missing:
        _check_values(tensor, ~missing, "given: training saw no row without it")
    is_small = missing | (abs(tensor.values.astype(np.float64)) <= MAX_NUMBER)
    _check_values(tensor, is_small, f"a number of at most {MAX_NUMBER:g}")
    return tensor.values


def _read_texts(column: CategoryColumn | IdColumn, tensor: Tensor) -> NDArray[Any]:
    if tensor.datatype != BYTES:
        if not isinstance(column, IdColumn):
            raise tensor.refuse("datatype", f"is {tensor.datatype}, it must be {BYTES}")
        _check_values(tensor, np.isfinite(tensor.values), "a number")
        return np.array([write_number(value) for value in tensor.values.tolist()], object)
    cleaned = [text if text is None else strip_text(text) for text in tensor.values.tolist()]
    if isinstance(column, IdColumn):
        cleaned = [text and shorten_number(text) for text in cleaned]
    return np.array(cleaned, object)


KINDS: dict[type[Features], Kind] = {
    ImageFeatures: Kind(_image_slots, _image_columns),
    SeriesFeatures: Kind(_series_slots, _series_columns),
    TextFeatures: Kind(_text_slots, _text_columns),
    TableFeatures: Kind(_table_slots, _table_columns),
}
