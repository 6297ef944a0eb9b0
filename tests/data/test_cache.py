"""Chunks made of the chunks that were read before are those that the bucket would give."""

import weakref

import pyarrow as pa
import pytest

from heliostat.data.cache import Cache, gather
from heliostat.data.order import Order

ORDER = Order(part_rows=(5, 3, 5, 1, 4, 5, 2), global_batch=8, parts_per_chunk=3, seed=11)


def read(index: int) -> pa.Table:
    """A chunk as the bucket has it: the part and the place of each row."""
    chunk = ORDER.chunk(index)
    rows = [[part, place] for part in chunk.parts for place in range(ORDER.part_rows[part])]
    return pa.table({"row": rows}).take(ORDER.permute(chunk))


@pytest.mark.parametrize("first", [0, 1, 4])
def test_later_chunks_are_made_of_those_of_one_epoch_from_wherever_it_began(first: int) -> None:
    cache = Cache(ORDER, max_bytes=1e6)
    index = first
    while not cache.is_whole:
        cache.add(index, read(index), 10)
        index += 1
    assert index >= first + ORDER.chunks_per_epoch
    for later in range(index, index + 3 * ORDER.chunks_per_epoch):
        found = cache.find(later)
        blocks = [one.block for one in found]
        assert gather(ORDER, later, [one.chunk for one in found], blocks).equals(read(later))


def test_a_split_that_is_too_large_is_not_kept_in_part() -> None:
    cache = Cache(ORDER, max_bytes=25)
    blocks = []
    for index in range(5 * ORDER.chunks_per_epoch):
        block = read(index)
        blocks.append(weakref.ref(block))
        cache.add(index, block, 10)
        assert not cache.is_whole
    del block
    assert [block() for block in blocks] == [None] * len(blocks)


def test_what_was_cleared_is_not_used_again() -> None:
    cache = Cache(ORDER, max_bytes=1e6)
    for index in range(ORDER.chunks_per_epoch):
        cache.add(index, read(index), 10)
    assert cache.is_whole
    cache.clear()
    assert not cache.is_whole
