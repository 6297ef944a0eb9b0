"""Shards: which one a row belongs to, how one is written, how a part is read and trusted."""

import base64
import hashlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from heliostat.data.encoding import stack_series
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
    TextFeatures,
    token_type,
)
from heliostat.data.manifest import SPLITS, RowGroup, Shard
from heliostat.data.ranged import RangedFile
from heliostat.errors import HeliostatError
from heliostat.spec import SplitSpec
from heliostat.storage import Store

WEIGHT = "weight"  # of rows whose loss has more than one term, as the tokens of a text
ORDER_BITS = 60
REJECTED = len(SPLITS) << ORDER_BITS
TAIL_BYTES = 8


def split_of(row_id: str, key: str, seed: int, split: SplitSpec) -> str:
    """The split of a row of the object `key`: a pure function of id, seed and shares."""
    if is_test_file(key, split):
        return "test"
    test = split.test if split.test_files is None else 0.0
    fraction = _hash(row_id, seed)[0] / 2**64
    if fraction < test:
        return "test"
    return "validation" if fraction < test + split.validation else "train"


def is_test_file(key: str, split: SplitSpec) -> bool:
    """Whether all rows of the object `key` are test rows."""
    return split.test_files is not None and fnmatchcase(key, split.test_files)


def order_of(row_id: str, key: str, seed: int, split: SplitSpec) -> int:
    """Where a row stands among all rows: by split, then by a hash of 60 bits."""
    index = SPLITS.index(split_of(row_id, key, seed, split))
    return index << ORDER_BITS | _hash(row_id, seed)[1] >> 64 - ORDER_BITS


def cut_points(num_shards: Mapping[str, int]) -> list[int]:
    """The orders at which a new shard begins, `num_shards` of them by split; then the bad rows."""
    return [
        index << ORDER_BITS | (part << ORDER_BITS) // num_shards[split]
        for index, split in enumerate(SPLITS)
        for part in range(num_shards[split])
    ] + [REJECTED]


def split_at(order: int) -> str:
    """The split that a row with this order belongs to."""
    return SPLITS[order >> ORDER_BITS]


def write_shard(table: pa.Table, rows_per_group: int) -> tuple[bytes, str, tuple[RowGroup, ...]]:
    """A Parquet file, with footer and row groups as a `Shard` has them; equal rows, equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.combine_chunks(),
        sink,
        row_group_size=rows_per_group,
        compression="zstd",
        use_dictionary=[name for name in table.column_names if name.startswith(COLUMN_PREFIX)],
        write_statistics=False,
        write_page_checksum=True,
        store_schema=False,
    )
    data = sink.getvalue().to_pybytes()
    metadata = pq.read_metadata(pa.BufferReader(data))
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    footer_bytes = int.from_bytes(data[-TAIL_BYTES:-4], "little") + TAIL_BYTES
    return (
        data,
        base64.b64encode(zlib.compress(data[-footer_bytes:])).decode(),
        tuple(_describe_group(data, group) for group in groups),
    )


@dataclass(frozen=True)
class Span:
    """The row groups from `first` to before `stop` of a shard: what is read at once."""

    shard: Shard
    first: int
    stop: int

    @property
    def groups(self) -> tuple[RowGroup, ...]:
        return self.shard.groups[self.first : self.stop]

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.groups)

    @property
    def bytes(self) -> int:
        return self.groups[-1].offset + self.groups[-1].bytes - self.groups[0].offset


def cut_spans(shard: Shard, max_rows: int, max_bytes: int) -> Iterator[Span]:
    """All row groups of a shard as spans, each as long as the limits allow, or one group."""
    first = 0
    for stop in range(1, len(shard.groups) + 1):
        longer = Span(shard, first, stop + 1)
        if stop == len(shard.groups) or longer.rows > max_rows or longer.bytes > max_bytes:
            yield Span(shard, first, stop)
            first = stop


def read_span(store: Store, span: Span) -> pa.Table:
    """The rows of a span, by one ranged read.

    Raises:
        HeliostatError: the shard is missing or short, or its bytes are not those of the manifest.
    """
    begin = span.groups[0].offset
    source = RangedFile(span.shard.bytes, partial(_cut, _read_verified(store, span), begin))
    footer = _parse_footer(span.shard.footer)
    file = pq.ParquetFile(source, metadata=footer, pre_buffer=False)
    return file.read_row_groups(list(range(span.first, span.stop)))


def read_group(store: Store, shard: Shard, index: int) -> pa.Table:
    """The rows of one row group; see `read_span`."""
    return read_span(store, Span(shard, index, index + 1))


def to_columns(features: Features, table: pa.Table) -> Columns:
    """The columns that `encode` takes, from rows of a shard."""
    if isinstance(features, ImageFeatures):
        shape = (-1, features.height, features.width, features.channels)
        return {IMAGE: image_bytes(table).reshape(shape)}
    if isinstance(features, SeriesFeatures):
        return {SERIES: stack_series(series_values(table, features.channels))}
    if isinstance(features, BlockFeatures):
        return {TOKENS: row_bytes(table, TOKENS).view(token_type(features.vocab))}
    if isinstance(features, TextFeatures):
        rows = table[TOKENS].combine_chunks()
        parts = np.split(rows.flatten().to_numpy(), np.cumsum(rows.value_lengths())[:-1])
        return {TOKENS: stack_series(parts if len(rows) else [])}
    texts = {
        name: table[name].to_numpy(zero_copy_only=False)
        for column in features.columns
        if not isinstance(column, NumericColumn)
        for name in [COLUMN_PREFIX + column.name]
    }
    if not features.numeric:
        return texts
    numbers = row_bytes(table, NUMBERS).view(np.float64)
    kept = np.delete(numbers, features.unused, axis=1) if features.unused else numbers
    return {NUMBERS: kept, **texts}


def label_values(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Labels as numbers: (rows,) of int32 or float64, or float64 (rows, names)."""
    if not pa.types.is_list(column.type) and not pa.types.is_fixed_size_list(column.type):
        return cast(npt.NDArray[Any], column.to_numpy())
    values = column.combine_chunks().flatten().to_numpy()
    return cast(npt.NDArray[Any], values.reshape(len(column), -1) if len(column) else values)


def series_values(table: pa.Table, channels: int) -> list[npt.NDArray[np.float32]]:
    """Each row of a shard as (steps, channels)."""
    column = table[SERIES].combine_chunks()
    values = column.flatten().to_numpy()
    ends = np.cumsum(column.value_lengths().to_numpy())
    return [part.reshape(-1, channels) for part in np.split(values, ends[:-1])] if len(ends) else []


def image_bytes(table: pa.Table) -> npt.NDArray[np.uint8]:
    """The pixels of a shard's rows, (rows, height * width * channels), without a copy if it can."""
    return row_bytes(table, IMAGE)


def row_bytes(table: pa.Table, name: str) -> npt.NDArray[np.uint8]:
    """A column of bytes as (rows, bytes of a row), without a copy if it can."""
    column = table[name].combine_chunks()
    width = column.type.byte_width
    if not len(column):
        return np.empty((0, width), np.uint8)
    data = np.frombuffer(column.buffers()[1], np.uint8)
    return data[column.offset * width :][: len(column) * width].reshape(len(column), width)


def pack_rows(numbers: npt.NDArray[np.float64]) -> pa.Array:
    """(rows, columns) as one column of bytes."""
    rows, columns = numbers.shape
    buffers = [None, pa.py_buffer(np.ascontiguousarray(numbers, "<f8"))]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(8 * columns), rows, buffers)


def _hash(row_id: str, seed: int) -> tuple[int, int]:
    """Two independent integers of 64 bits: the first decides the split, the second the order."""
    hashed = hashlib.blake2b(f"{seed}:{row_id}".encode(), digest_size=16).digest()
    return int.from_bytes(hashed[:8], "big"), int.from_bytes(hashed[8:], "big")


def _describe_group(data: bytes, group: pq.RowGroupMetaData) -> RowGroup:
    chunks = [group.column(index) for index in range(group.num_columns)]
    start = min(chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks)
    end = max(
        (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size
        for chunk in chunks
    )
    sha256 = hashlib.sha256(memoryview(data)[start:end]).hexdigest()
    return RowGroup(start, end - start, group.num_rows, sha256)


@lru_cache(maxsize=1024)
def _parse_footer(footer: str) -> pq.FileMetaData:
    return pq.read_metadata(pa.BufferReader(zlib.decompress(base64.b64decode(footer))))


def _read_verified(store: Store, span: Span) -> bytearray:
    """What is damaged is read once more: a network may garble what the bucket keeps well."""
    for _ in range(2):
        data = _read_bytes(store, span)
        damaged = _find_damaged(span, data)
        if damaged is None:
            return data
    raise HeliostatError(
        f"the bytes of row group {damaged} of {store.uri}/{span.shard.key} are not those that were "
        "written: delete the object and prepare the data again"
    )


def _read_bytes(store: Store, span: Span) -> bytearray:
    try:
        return store.read_range(span.shard.key, span.groups[0].offset, span.bytes)
    except HeliostatError as error:
        raise HeliostatError(
            f"row group {span.first} of a shard cannot be read: {error}"
        ) from error


def _find_damaged(span: Span, data: bytearray) -> int | None:
    """The number of the first row group that is not the one that was written."""
    for index, group in enumerate(span.groups, start=span.first):
        start = group.offset - span.groups[0].offset
        part = memoryview(data)[start : start + group.bytes]
        if hashlib.sha256(part).hexdigest() != group.sha256:
            return index
    return None


def _cut(data: bytearray, first: int, offset: int, count: int) -> memoryview:
    """`count` bytes at `offset` of a file whose bytes from `first` on are `data`."""
    return memoryview(data)[offset - first : offset - first + count]
