"""Laws of the sample order: each row once per epoch, the same batches for any worker count."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from heliostat.data.order import Order, share

orders = st.builds(
    Order,
    part_rows=st.lists(st.integers(1, 40), min_size=1, max_size=12).map(tuple),
    global_batch=st.integers(1, 50),
    parts_per_chunk=st.integers(1, 5),
    seed=st.integers(0, 2**40),
)


def rows_of_epoch(order: Order, epoch: int) -> list[tuple[int, int]]:
    """(group, row in group) in the order in which an epoch visits them."""
    rows = []
    first = epoch * order.chunks_per_epoch
    for index in range(first, first + order.chunks_per_epoch):
        chunk = order.chunk(index)
        read = [(g, row) for g in chunk.parts for row in range(order.part_rows[g])]
        rows += [read[position] for position in order.permute(chunk)]
    return rows


@given(orders, st.integers(0, 3))
def test_an_epoch_visits_every_row_once(order: Order, epoch: int) -> None:
    everything = [(g, row) for g, rows in enumerate(order.part_rows) for row in range(rows)]
    assert sorted(rows_of_epoch(order, epoch)) == everything


@given(orders, st.integers(0, 3))
def test_batches_cut_an_epoch_without_rest(order: Order, epoch: int) -> None:
    first = epoch * order.steps_per_epoch
    batches = [order.batch_rows(first + step) for step in range(order.steps_per_epoch)]
    assert sum(batches) == order.rows
    assert set(batches[:-1]) <= {order.global_batch}


@given(orders, st.integers(0, 400))
def test_a_step_is_located_where_the_steps_before_it_end(order: Order, step: int) -> None:
    index, skip = order.locate(step)
    epoch, in_epoch = divmod(step, order.steps_per_epoch)
    before = range(epoch * order.chunks_per_epoch, index)
    assert sum(order.chunk(i).rows for i in before) + skip == in_epoch * order.global_batch
    assert 0 <= skip < order.chunk(index).rows


@given(st.integers(0, 1000), st.integers(1, 16))
def test_ranks_share_a_batch_without_gap_or_overlap(rows: int, world_size: int) -> None:
    shares = [share(rows, rank, world_size) for rank in range(world_size)]
    assert [row for part in shares for row in range(part.start, part.stop)] == list(range(rows))
    sizes = [part.stop - part.start for part in shares]
    assert max(sizes) - min(sizes) <= 1


def test_epochs_and_seeds_differ_and_repeat() -> None:
    order = Order((64,) * 16, 32, 4, seed=1)
    other = Order((64,) * 16, 32, 4, seed=2)
    assert rows_of_epoch(order, 0) == rows_of_epoch(Order((64,) * 16, 32, 4, seed=1), 0)
    assert rows_of_epoch(order, 0) != rows_of_epoch(order, 1)
    assert rows_of_epoch(order, 0) != rows_of_epoch(other, 0)


def test_neighbours_in_storage_do_not_stay_neighbours() -> None:
    """Of rows stored side by side fewer than 1 in 100 are visited one after the other."""
    order = Order((256,) * 32, 64, 8, seed=3)
    visited = np.array([group * 256 + row for group, row in rows_of_epoch(order, 0)])
    assert np.mean(np.diff(visited) == 1) < 0.01
