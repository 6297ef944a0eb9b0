"""The rows of a split in the cluster's memory: what was read once is not read again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from heliostat.data.order import Chunk, Order


@dataclass(frozen=True)
class Source:
    """The block, as Ray refers to it, in which the rows of a chunk are stored in its order."""

    chunk: Chunk
    block: Any


class Cache:
    """Chunks that were read, by the parts in them, until all parts of the split are there.

    They stay as long as they take no more than `max_bytes`; if the split is larger, none does.
    """

    def __init__(self, order: Order, max_bytes: float) -> None:
        self._order, self._max_bytes = order, max_bytes
        self._sources: dict[int, Source] = {}
        self._bytes = 0

    @property
    def is_whole(self) -> bool:
        return len(self._sources) == len(self._order.part_rows)

    def clear(self) -> None:
        self._sources.clear()
        self._bytes = 0

    def add(self, index: int, block: Any, size: int) -> None:
        """Keep the chunk with this number, which takes `size` bytes."""
        chunk = self._order.chunk(index)
        fresh = [part for part in chunk.parts if part not in self._sources]
        if not fresh or not self._max_bytes:
            return
        self._bytes += size
        if self._bytes > self._max_bytes:
            self._max_bytes = 0
            self.clear()
            return
        self._sources.update(dict.fromkeys(fresh, Source(chunk, block)))

    def find(self, index: int) -> list[Source]:
        """Where the parts of the chunk with this number are, in its order; all must be there."""
        return [self._sources[part] for part in self._order.chunk(index).parts]


def gather(
    order: Order, index: int, sources: Sequence[Chunk], blocks: Sequence[pa.Table]
) -> pa.Table:
    """The chunk with this number, each part of it taken from the block of its source."""
    chunk = order.chunk(index)
    parts = [
        block.take(_places(order, source, part))
        for part, source, block in zip(chunk.parts, sources, blocks, strict=True)
    ]
    return pa.concat_tables(parts).take(order.permute(chunk)).combine_chunks()


def _places(order: Order, source: Chunk, part: int) -> npt.NDArray[np.int64]:
    """Where the rows of `part` are in the block of a chunk that has it."""
    permuted = order.permute(source)
    places = np.empty_like(permuted)
    places[permuted] = np.arange(len(permuted))
    before = source.parts[: source.parts.index(part)]
    first = sum(order.part_rows[other] for other in before)
    return places[first : first + order.part_rows[part]]
