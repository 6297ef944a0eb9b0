"""A data set as batches: Ray Data reads and verifies spans of rows in the order of `order`."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.exceptions import RayError

from heliostat import pools
from heliostat.data.cache import Cache, gather
from heliostat.data.manifest import Manifest
from heliostat.data.order import Order, share
from heliostat.data.shards import (
    WEIGHT,
    Span,
    cut_spans,
    label_values,
    read_span,
    to_columns,
)
from heliostat.data.waiting import say_if_waiting
from heliostat.errors import HeliostatError
from heliostat.storage import Store

SENTENCE = "heliostat.error"
SPAN_ROWS = 4096
SPAN_BYTES = 16 << 20  # small ranges of large objects cost a store several times the work
CHUNK_ROWS = 4 * SPAN_ROWS
CHUNK_BYTES = 2 * SPAN_BYTES
CHUNKS_PER_PIPELINE = 256  # planning costs about 2 ms each
CHUNKS_KEPT = 8
CHUNKS_AHEAD = 4
LOOK_SECONDS = 0.02
PARALLEL_READS = 4
CLOSE_SECONDS = 5

Columns = Mapping[str, npt.NDArray[Any]]
T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """One rank's rows of a global batch; there may be none.

    They begin at `first_row` of the `rows` rows of the batch, which together weigh `weight`.
    """

    columns: Columns
    first_row: int
    rows: int
    weight: int


def plan(manifest: Manifest, split: str, global_batch: int, seed: int) -> Order:
    """The order of samples of `split`, in chunks of CHUNK_ROWS rows or CHUNK_BYTES at most."""
    spans = _spans(manifest, split)
    most_rows = max((span.rows for span in spans), default=1)
    most_bytes = max((span.bytes for span in spans), default=1)
    per_chunk = max(1, min(CHUNK_ROWS // most_rows, CHUNK_BYTES // most_bytes))
    return Order(tuple(span.rows for span in spans), global_batch, per_chunk, seed)


def read_split(store: Store, manifest: Manifest, split: str, batch: int) -> Iterator[Columns]:
    """Every row of `split` once, as columns of up to `batch` rows."""
    spans = _spans(manifest, split)
    if not spans:
        return
    say_if_waiting(cpus=1)
    configure(ray.data.DataContext.get_current())

    def read(rows: pa.Table) -> pa.Table:
        return _told(lambda: read_span(store, spans[rows["id"][0].as_py()]))

    dataset = ray.data.range(len(spans), override_num_blocks=len(spans)).map_batches(
        read, batch_size=None, batch_format="pyarrow"
    )
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        table = _checked(block)
        for first in range(0, table.num_rows, batch):
            yield _columns(manifest, table.slice(first, batch))


class ChunkReader:
    """The body of one actor per run: it runs the pipeline and hands out references to chunks.

    Chunks are asked for by number, by every rank and roughly in step, so the last few are kept. A
    number elsewhere, as after a restart from a checkpoint, starts the pipeline anew from there.

    A split that takes no more than `cache_share` of the cluster's object store stays there: once
    all of it was read, chunks are made of what is there, and the bucket is left alone.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        split: str,
        order: Order,
        steps: int,
        cache_share: float = 0.0,
    ):
        self._store, self._order = store, order
        self._stop = order.end_chunk(steps)
        memory = ray.cluster_resources().get("object_store_memory", 0)
        self._cache = Cache(order, cache_share * memory)
        self._spans = _spans(manifest, split)
        self._bundles: Iterator[Any] = iter(())
        self._kept: dict[int, list[ray.ObjectRef]] = {}
        self._next = -1  # the first one is a start as well
        self._read_bytes = 0
        self._turn = asyncio.Lock()
        context = ray.data.DataContext.get_current()
        configure(context)
        context.target_max_block_size = None
        context.execution_options.preserve_order = True
        context.custom_execution_callback_classes = [Breather]

    async def chunk(self, index: int) -> list[ray.ObjectRef]:
        """References to the blocks of chunk `index`, its rows in the order of the epoch.

        Who asks for one that is there does not wait for those who ask for the next one.
        """
        if index not in self._kept:
            async with self._turn:
                if index not in self._kept:
                    await asyncio.to_thread(self._advance, index)
        return self._kept[index]

    def read_bytes(self) -> int:
        """Bytes of the chunks that came from the bucket, as they are stored there."""
        return self._read_bytes

    async def close(self) -> None:
        """End the pipeline, and with it what Ray Data sets aside of the cluster for it: of an actor
        that was killed, that is kept from other pipelines until it expires."""
        self._bundles = iter(())

    def _count(self, index: int) -> None:
        self._read_bytes += sum(self._spans[part].bytes for part in self._order.chunk(index).parts)

    def _advance(self, index: int) -> None:
        if index != self._next:
            self._start(index)
        elif self._cache.is_whole:
            self._keep(self._gather())
        else:
            self._keep(self._take())

    def _start(self, index: int) -> None:
        """Go on at `index`, which is read here: a pipeline takes longer to begin, and its processes
        would compete with workers that start.
        """
        self._bundles, self._next = iter(()), index
        self._kept.clear()
        self._cache.clear()  # a node may have gone with some of it
        table = _told(lambda: _read_chunk(self._store, self._spans, self._order, index))
        self._count(index)
        block = ray.put(table)
        self._cache.add(index, block, table.nbytes)
        self._keep(block)

    def _keep(self, block: ray.ObjectRef) -> None:
        self._kept[self._next] = [block]
        self._kept.pop(self._next - CHUNKS_KEPT, None)
        self._next += 1

    def _take(self) -> ray.ObjectRef:
        """The next chunk of the pipeline."""
        bundle = next(self._bundles, None)
        if bundle is None:
            self._bundles = self._read(self._next)
            bundle = next(self._bundles)
        self._count(self._next)
        (block,) = bundle.block_refs
        self._cache.add(self._next, block, bundle.size_bytes())
        return block

    def _gather(self) -> ray.ObjectRef:
        """The next chunk, made of those that are in memory."""
        self._bundles = iter(())
        sources = self._cache.find(self._next)
        blocks = ray.get([one.block for one in sources])

        def make() -> pa.Table:
            chunks = [one.chunk for one in sources]
            return gather(self._order, self._next, chunks, [_checked(block) for block in blocks])

        return ray.put(_told(make))

    def _read(self, first: int) -> Iterator[Any]:
        store, order, spans = self._store, self._order, self._spans
        count = min(CHUNKS_PER_PIPELINE, self._stop - first)

        def read(rows: pa.Table) -> pa.Table:
            index = first + rows["id"][0].as_py()
            return _told(lambda: _read_chunk(store, spans, order, index))

        dataset = ray.data.range(count, override_num_blocks=count).map_batches(
            read, batch_size=None, batch_format="pyarrow"
        )
        return iter(dataset.iter_internal_ref_bundles())


def _read_chunk(store: Store, spans: list[Span], order: Order, index: int) -> pa.Table:
    chunk = order.chunk(index)
    with ThreadPoolExecutor(PARALLEL_READS) as threads:
        tables = list(threads.map(lambda part: read_span(store, spans[part]), chunk.parts))
    return pa.concat_tables(tables).take(order.permute(chunk)).combine_chunks()


class Breather(ExecutionCallback):  # type: ignore[misc]  # Ray has no types
    """Lets a pipeline look around every LOOK_SECONDS: while its results wait to be taken, Ray Data
    looks without a pause, which takes half a core from the training beside it."""

    def __init__(self) -> None:
        self._looked = 0.0

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(max(0.0, self._looked + LOOK_SECONDS - time.monotonic()))
        self._looked = time.monotonic()


@contextmanager
def start_reader(*arguments: Any, **options: Any) -> Iterator[Any]:
    """The actor of a `ChunkReader` of these arguments, with these options of Ray."""
    reader: Any = ray.remote(ChunkReader).options(num_cpus=0, **options)
    actor = reader.remote(*arguments)
    try:
        yield actor
    finally:
        with suppress(RayError):
            ray.get(actor.close.remote(), timeout=CLOSE_SECONDS)
        ray.kill(actor)


def fetch_from(reader: Any) -> Callable[[int], pa.Table]:
    """How a worker gets a chunk from the actor of a `ChunkReader`."""

    def fetch(index: int) -> pa.Table:
        blocks = ray.get(ray.get(reader.chunk.remote(index)))
        return pa.concat_tables(map(_checked, blocks))

    return fetch


def iter_shares(
    order: Order,
    manifest: Manifest,
    fetch: Callable[[int], pa.Table],
    *,
    steps: range,
    rank: int,
    world_size: int,
) -> Iterator[Share]:
    """The rows that `rank` trains on at each of `steps` (counted from 0).

    `fetch` returns the rows of a chunk in order; chunks are fetched ahead on a thread.
    """
    if not steps:
        return
    first_chunk, skip = order.locate(steps.start)
    with ThreadPoolExecutor(1) as thread:
        rows = _Sequence(_ahead(thread, fetch, first_chunk, order.end_chunk(steps.stop)), skip)
        for step in steps:
            count = order.batch_rows(step)
            mine = share(count, rank, world_size)
            whole = rows.take(count)
            table = whole.slice(mine.start, mine.stop - mine.start)
            yield Share(_columns(manifest, table), mine.start, count, _weigh(whole))


def iter_part(
    store: Store, manifest: Manifest, split: str, *, rank: int, world_size: int, batch: int
) -> Iterator[Share]:
    """The rows of `split` that `rank` looks at, up to `batch` at a time, read without Ray.

    All ranks together see each row once, and each has as many batches: the last ones may be empty.
    """
    spans = _spans(manifest, split)
    parts = [spans[other::world_size] for other in range(world_size)]
    counts = [sum(-(-span.rows // batch) for span in part) for part in parts]
    empty = None
    for span in parts[rank]:
        table = read_span(store, span)
        empty = table.slice(0, 0)
        for first in range(0, table.num_rows, batch):
            yield _share(manifest, table.slice(first, batch))
    if empty is None:
        empty = read_span(store, spans[0]).slice(0, 0)
    for _ in range(max(counts) - counts[rank]):
        yield _share(manifest, empty)


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, the next of which is made on a thread while one is used."""
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = thread.submit(next, items, None)
            yield item


def _share(manifest: Manifest, rows: pa.Table) -> Share:
    return Share(_columns(manifest, rows), 0, rows.num_rows, _weigh(rows))


class _Sequence:
    """Tables one after another, taken from in pieces of any length."""

    def __init__(self, tables: Iterator[pa.Table], skip: int):
        self._tables = tables
        self._rest = next(tables).slice(skip)

    def take(self, count: int) -> pa.Table:
        while self._rest.num_rows < count:
            self._rest = pa.concat_tables([self._rest, next(self._tables)])
        taken, self._rest = self._rest.slice(0, count), self._rest.slice(count)
        return taken


def _ahead(
    thread: ThreadPoolExecutor, fetch: Callable[[int], pa.Table], first: int, stop: int
) -> Iterator[pa.Table]:
    pending: deque[Future[pa.Table]] = deque()
    for index in range(first, stop):
        pending.append(thread.submit(fetch, index))
        if len(pending) > CHUNKS_AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _told(read: Callable[[], pa.Table]) -> pa.Table:
    """What `read` returns, or its sentence as a block: Ray keeps only the text of an exception."""
    try:
        return read()
    except HeliostatError as error:
        return pa.table({SENTENCE: [str(error)]})


def _checked(block: pa.Table) -> pa.Table:
    if SENTENCE in block.column_names:
        raise HeliostatError(block[SENTENCE][0].as_py())
    return block


def _weigh(rows: pa.Table) -> int:
    """A row weighs 1 if it does not say."""
    return pc.sum(rows[WEIGHT]).as_py() or 0 if WEIGHT in rows.column_names else rows.num_rows


def _columns(manifest: Manifest, table: pa.Table) -> Columns:
    columns = dict(to_columns(manifest.features, table))
    if "label" in table.column_names:  # else the row is its own target
        columns["label"] = label_values(table["label"])
    return columns


def _spans(manifest: Manifest, split: str) -> list[Span]:
    shards = manifest.shards_of(split)
    return [span for shard in shards for span in cut_spans(shard, SPAN_ROWS, SPAN_BYTES)]


def configure(context: ray.data.DataContext) -> None:
    """Say nothing about a pipeline in the job's log: the stage reports its own progress. It runs in
    the pool for data, if there is one."""
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.label_selector = pools.select("data") or None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
