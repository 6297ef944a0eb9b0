"""What the ranks of a run get: every row once an epoch, the same batches for any count."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

from datasets import row_numbers, row_weight, store_images
from heliostat.data import stream
from heliostat.data.manifest import Manifest
from heliostat.data.order import Order
from heliostat.data.shards import cut_spans, read_span
from heliostat.storage import Store, connect

ROWS = {"train": 301, "test": 40}
SHARE = 0.1


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return connect(str(tmp_path))


def make_fetch(store: Store, manifest: Manifest, order: Order) -> Callable[[int], pa.Table]:
    """Chunks without a cluster."""
    spans = [
        span
        for shard in manifest.shards_of("train")
        for span in cut_spans(shard, stream.SPAN_ROWS, stream.SPAN_BYTES)
    ]

    def fetch(index: int) -> pa.Table:
        chunk = order.chunk(index)
        tables = [read_span(store, spans[part]) for part in chunk.parts]
        return pa.concat_tables(tables).take(order.permute(chunk))

    return fetch


def train_batches(
    store: Store, manifest: Manifest, order: Order, steps: range, world_size: int
) -> list[list[int]]:
    """The row numbers of each global batch, put together from the shares of all ranks."""
    fetch = make_fetch(store, manifest, order)
    ranks = [
        stream.iter_shares(order, manifest, fetch, steps=steps, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    batches = []
    for shares in zip(*ranks, strict=True):
        rows = [number for share in shares for number in row_numbers(share.columns["image"])]
        assert {share.rows for share in shares} == {len(rows)}
        batches.append(rows)
    return batches


@pytest.mark.parametrize("batch", [1, 7, 64, 300, 1000])
def test_any_worker_count_and_any_resumption_sees_the_same_batches(
    store: Store, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SPAN_ROWS", 50)
    manifest = store_images(store, ROWS)
    order = Order(stream.plan(manifest, "train", batch, 5).part_rows, batch, 3, 5)
    steps = 2 * order.steps_per_epoch
    whole = train_batches(store, manifest, order, range(steps), world_size=1)
    for world_size in (2, 3):
        assert train_batches(store, manifest, order, range(steps), world_size) == whole
    cut = steps * 2 // 3
    assert train_batches(store, manifest, order, range(cut, steps), 2) == whole[cut:]
    for epoch in range(2):
        seen = whole[epoch * order.steps_per_epoch : (epoch + 1) * order.steps_per_epoch]
        assert sorted(number for rows in seen for number in rows) == list(range(ROWS["train"]))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("batch", [1, 16, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_ranks_together_look_at_each_row_of_a_split_once(
    store: Store,
    world_size: int,
    batch: int,
    weighted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "SPAN_ROWS", 16)
    manifest = store_images(store, ROWS, weighted=weighted)
    parts = [
        list(
            stream.iter_part(store, manifest, "test", rank=rank, world_size=world_size, batch=batch)
        )
        for rank in range(world_size)
    ]
    assert len({len(part) for part in parts}) == 1
    shares = [share for part in parts for share in part]
    numbers = [number for share in shares for number in row_numbers(share.columns["image"])]
    assert sorted(numbers) == list(range(ROWS["train"], ROWS["train"] + ROWS["test"]))
    weights = [row_weight(number) if weighted else 1 for number in numbers]
    assert sum(share.weight for share in shares) == sum(weights)
    assert max(share.rows for share in shares) <= batch


def test_a_rank_without_rows_still_takes_part(store: Store) -> None:
    manifest = store_images(store, {"train": 3})
    order = stream.plan(manifest, "train", 3, seed=0)
    assert [len(rows) for rows in train_batches(store, manifest, order, range(4), 5)] == [3] * 4


@contextmanager
def run_reader(
    store: Store, manifest: Manifest, order: Order, chunks: int, cache_share: float = 0.0
) -> Iterator[Callable[[int], pa.Table]]:
    """What fetches chunks from an actor that reads so many of them."""
    import ray

    ray.init(ignore_reinit_error=True)
    steps = -(-chunks // order.chunks_per_epoch) * order.steps_per_epoch
    with stream.start_reader(store, manifest, "train", order, steps, cache_share) as reader:
        yield stream.fetch_from(reader)


@pytest.mark.cluster
def test_the_pipeline_hands_out_chunks_in_order_from_any_position(cluster: object) -> None:
    store = connect(f"{cluster.root}/test-stream")  # type: ignore[attr-defined]
    manifest = store_images(store, ROWS)
    order = Order(stream.plan(manifest, "train", 64, 1).part_rows, 64, 2, 1)
    expected = make_fetch(store, manifest, order)
    with run_reader(store, manifest, order, 4 * order.chunks_per_epoch) as fetch:
        for index in (0, 1, 2, 1, 6, 7, 3):
            assert fetch(index).equals(expected(index))


@pytest.mark.cluster
def test_a_reader_that_has_ended_keeps_no_cpu_from_others(
    cluster: object, wait_until: Callable[..., None]
) -> None:
    import ray
    from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator

    def find_pipelines() -> set[str]:
        """Those that Ray Data shares the cluster among."""
        coordinator = get_or_create_autoscaling_coordinator()
        return set(ray.get(coordinator.__ray_call__.remote(lambda self: [*self._ongoing_reqs])))

    store = connect(f"{cluster.root}/test-stream")  # type: ignore[attr-defined]
    manifest = store_images(store, ROWS)
    order = Order(stream.plan(manifest, "train", 64, 1).part_rows, 64, 2, 1)
    ray.init(ignore_reinit_error=True)
    before = find_pipelines()
    with run_reader(store, manifest, order, 4 * order.chunks_per_epoch) as fetch:
        for index in (0, 1):
            fetch(index)
        during = find_pipelines() - before
    assert during
    wait_until(lambda: not during & find_pipelines(), 10)


@pytest.mark.cluster
def test_what_was_read_once_comes_from_memory(cluster: object) -> None:
    store = connect(f"{cluster.root}/test-stream-kept")  # type: ignore[attr-defined]
    manifest = store_images(store, ROWS)
    order = Order(stream.plan(manifest, "train", 64, 1).part_rows, 64, 2, 1)
    expected = make_fetch(store, manifest, order)
    # More than a pipeline may have read ahead when the bucket is emptied.
    chunks = [expected(index) for index in range(stream.CHUNKS_PER_PIPELINE + 8)]
    with run_reader(store, manifest, order, len(chunks), SHARE) as fetch:
        for index, chunk in enumerate(chunks):
            if index == order.chunks_per_epoch:
                for shard in manifest.shards:
                    store.delete(shard.key)
            assert fetch(index).equals(chunk)


@pytest.mark.cluster
def test_a_chunk_that_is_there_is_not_waited_for(cluster: object) -> None:
    import ray

    ray.init(ignore_reinit_error=True)
    store = connect(f"{cluster.root}/test-stream")  # type: ignore[attr-defined]
    manifest = store_images(store, ROWS)
    order = Order(stream.plan(manifest, "train", 64, 1).part_rows, 64, 2, 1)
    entered, released = asyncio.Event(), threading.Event()

    async def ask() -> None:
        loop = asyncio.get_running_loop()

        class Slow(stream.ChunkReader):
            def _take(self) -> ray.ObjectRef:
                loop.call_soon_threadsafe(entered.set)
                assert released.wait(60)
                return super()._take()

        reader = Slow(store, manifest, "train", order, order.steps_per_epoch)
        first = await reader.chunk(0)
        second = asyncio.create_task(reader.chunk(1))
        await entered.wait()
        async with asyncio.timeout(60):
            assert await reader.chunk(0) == first
        released.set()
        assert await second != first

    asyncio.run(ask())


@pytest.mark.cluster
def test_a_split_is_read_whole(cluster: object) -> None:
    import ray

    store = connect(f"{cluster.root}/test-stream")  # type: ignore[attr-defined]
    manifest = store_images(store, ROWS)
    ray.init(ignore_reinit_error=True)
    batches = list(stream.read_split(store, manifest, "test", 16))
    rows = [number for batch in batches for number in row_numbers(batch["image"])]
    assert sorted(rows) == list(range(301, 341))
    assert all(len(batch["label"]) <= 16 for batch in batches)


def test_one_ahead_makes_the_next_item_while_one_is_used_and_no_more() -> None:
    made: list[int] = []
    ready = threading.Event()

    def items() -> Iterator[int]:
        for number in range(1, 5):
            made.append(number)
            if number == 2:
                ready.set()
            yield number

    taken = stream.one_ahead(items())
    assert next(taken) == 1
    assert ready.wait(10)
    assert made == [1, 2]
    assert list(taken) == [2, 3, 4]


def test_what_fails_while_it_is_made_ahead_fails_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("damaged")

    taken = stream.one_ahead(items())
    assert next(taken) == 1
    with pytest.raises(ValueError, match="damaged"):
        next(taken)
