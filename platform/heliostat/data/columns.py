"""Columns of tables: what their types say, and their values as numbers, texts and names."""

import math
from decimal import Decimal

import pyarrow as pa
import pyarrow.compute as pc

from heliostat.data.cells import MAX_NUMBER, parse_number, shorten_number, strip_text, write_number
from heliostat.data.raw import MAX_LABELS
from heliostat.data.tally import drop_words

NUMBER_TYPES = ("is_integer", "is_floating", "is_decimal")
NUMERIC_TYPES = (*NUMBER_TYPES, "is_timestamp", "is_date")
TEXT_TYPES = ("is_string", "is_large_string", "is_string_view")
CATEGORY_TYPES = (*TEXT_TYPES, "is_boolean", "is_null")
CATEGORY_OR_NUMERIC = ("numeric", "category")


def to_texts(column: pa.Array) -> pa.Array:
    """Strings, null where missing."""
    if pa.types.is_floating(column.type):
        texts = [_number_text(value) for value in column.to_pylist()]
        return pa.array(texts, pa.string())
    if pa.types.is_decimal(column.type):
        texts = [_decimal_text(value) for value in column.to_pylist()]
        return pa.array(texts, pa.string())
    if not _is_one_of(column.type, TEXT_TYPES):
        return column.cast(pa.string())
    stripped = [value if value is None else strip_text(value) for value in column.to_pylist()]
    return pa.array(stripped, pa.string())


def _number_text(value: float | None) -> str | None:
    if value is None or math.isnan(value):
        return None
    return write_number(value)


def _decimal_text(value: Decimal | None) -> str | None:
    """As that of the same number in another type."""
    if value is None:
        return None
    whole, point, part = f"{value:f}".partition(".")
    return whole + (point + part).rstrip("0").rstrip(".")


def to_names(column: pa.Array) -> pa.Array:
    """Texts in which a whole number is written without a decimal point: of labels and ids."""
    texts = to_texts(column).to_pylist()
    return pa.array([text and shorten_number(text) for text in texts], pa.string())


def to_numbers(column: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Numbers, null where missing, and where there is something that is no finite number."""
    if _is_one_of(column.type, TEXT_TYPES):
        texts = drop_words(to_texts(column))
        parsed = [text if text is None else parse_number(text) for text in texts.to_pylist()]
        numbers = pa.array(parsed, pa.float64())
        return numbers, pc.and_(texts.is_valid(), numbers.is_null())
    numbers = _cast_numbers(column)
    numbers = pc.if_else(pc.is_nan(numbers), pa.scalar(None, pa.float64()), numbers)
    return numbers, pc.fill_null(pc.greater(pc.abs(numbers), MAX_NUMBER), False)


def _cast_numbers(column: pa.Array) -> pa.Array:
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        microseconds = column.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
        return pc.divide(microseconds.cast(pa.float64(), safe=False), 1e6)
    return column.cast(pa.float64(), safe=False)


def _is_one_of(kind: pa.DataType, predicates: tuple[str, ...]) -> bool:
    return any(getattr(pa.types, predicate)(kind) for predicate in predicates)


def add_labels(labels: set[str], column: pa.Array) -> set[str]:
    """`labels` and those in `column`; it stops growing where they cannot be classes any more."""
    if len(labels) > MAX_LABELS:
        return labels
    return labels | set(filter(None, pc.unique(to_names(column)).to_pylist()))


def plain_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def plain(column: pa.Array) -> pa.Array:
    """The values themselves; raises ArrowInvalid if one says that it is a text and is not UTF-8."""
    values = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        values.validate(full=True)
    return values


def family_of(kind: pa.DataType) -> str:
    """The same for types whose values mean the same in a table."""
    if _is_one_of(kind, NUMBER_TYPES):
        return "number"
    return "text" if _is_one_of(kind, TEXT_TYPES) else str(kind)


def kind_of(kind: pa.DataType) -> str:
    """numeric, category, or the name of a type that is neither."""
    if _is_one_of(kind, NUMERIC_TYPES):
        return "numeric"
    return "category" if _is_one_of(kind, CATEGORY_TYPES) else str(kind)
