"""The order of samples: a pure function of (parts, seed, epoch), whatever the worker count.

A part is a span of rows that lie together in storage. An epoch is a permutation of the parts, cut
into chunks of a fixed number of parts; the rows of a chunk are permuted among themselves. Global
batches are consecutive rows of that sequence, the last one of an epoch may be short. Every row is
in exactly one batch of every epoch.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Chunk:
    """Parts whose rows are mixed: `parts` are positions in `Order.part_rows`."""

    epoch: int
    position: int
    parts: tuple[int, ...]
    rows: int


@dataclass(frozen=True)
class Order:
    """The sequence of global batches over parts of `part_rows` rows each."""

    part_rows: tuple[int, ...]
    global_batch: int
    parts_per_chunk: int
    seed: int

    @cached_property
    def rows(self) -> int:
        return sum(self.part_rows)

    @cached_property
    def steps_per_epoch(self) -> int:
        return -(-self.rows // self.global_batch)

    @cached_property
    def chunks_per_epoch(self) -> int:
        return -(-len(self.part_rows) // self.parts_per_chunk)

    def chunk(self, index: int) -> Chunk:
        """The chunk with this number, counted over all epochs."""
        epoch, position = divmod(index, self.chunks_per_epoch)
        first = position * self.parts_per_chunk
        parts = _permutation(len(self.part_rows), self.seed, epoch)
        chosen = tuple(map(int, parts[first : first + self.parts_per_chunk]))
        return Chunk(epoch, position, chosen, sum(self.part_rows[part] for part in chosen))

    def permute(self, chunk: Chunk) -> npt.NDArray[np.int64]:
        """The order of the rows of a chunk, as positions in its parts read one after another."""
        return _permutation(chunk.rows, self.seed, chunk.epoch, chunk.position + 1)

    def batch_rows(self, step: int) -> int:
        """Rows of the global batch of `step` (from 0)."""
        done = (step % self.steps_per_epoch) * self.global_batch
        return min(self.global_batch, self.rows - done)

    def locate(self, step: int) -> tuple[int, int]:
        """(chunk number, rows of it that earlier steps took) where the batch of `step` begins."""
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        index, skip = epoch * self.chunks_per_epoch, in_epoch * self.global_batch
        while skip >= (rows := self.chunk(index).rows):
            index, skip = index + 1, skip - rows
        return index, skip

    def end_chunk(self, steps: int) -> int:
        """The number of the first chunk that the first `steps` steps do not need."""
        index, begun = self.locate(steps)
        return index + (begun > 0)


def share(rows: int, rank: int, world_size: int) -> slice:
    """The rows of a batch that `rank` takes: consecutive, sizes differ by at most one."""
    return slice(rows * rank // world_size, rows * (rank + 1) // world_size)


@lru_cache(maxsize=8)
def _permutation(count: int, *key: int) -> npt.NDArray[np.int64]:
    seed = hashlib.sha256(repr(key).encode()).digest()
    order = np.random.Generator(np.random.PCG64(int.from_bytes(seed[:16], "big"))).permutation(
        count
    )
    order.setflags(write=False)
    return order
