"""Which shard a row belongs to, and that no shard is read whose bytes are not the written ones."""

import contextlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets import store_images
from garbling import GarblingStore
from heliostat.data.encoding import encode
from heliostat.data.features import CategoryColumn, NumericColumn, TableFeatures
from heliostat.data.manifest import Manifest, Shard, check_shards
from heliostat.data.shards import (
    REJECTED,
    cut_points,
    cut_spans,
    order_of,
    pack_rows,
    read_group,
    read_span,
    split_at,
    split_of,
    to_columns,
    write_shard,
)
from heliostat.errors import HeliostatError
from heliostat.spec import SplitSpec
from heliostat.storage import Store, connect

IDS = [f"train.csv#{row}" for row in range(20_000)]
SPLIT = SplitSpec(validation=0.1, test=0.2)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return connect(str(tmp_path))


@pytest.fixture
def manifest(store: Store) -> Manifest:
    return store_images(store, {"train": 200, "test": 10}, rows_per_shard=100, rows_per_group=40)


@given(st.text(), st.integers(0, 2**63 - 1))
def test_a_row_is_placed_by_its_id_and_the_seed_alone(row_id: str, seed: int) -> None:
    row_id = row_id.encode(errors="replace").decode()
    split = split_of(row_id, "a.csv", seed, SPLIT)
    order = order_of(row_id, "a.csv", seed, SPLIT)
    assert split_of(row_id, "b.csv", seed, SPLIT) == split == split_at(order)
    assert 0 <= order < REJECTED < 2**63


def test_placement_stays_what_it_was() -> None:
    """A change here would move rows between the splits of data sets that exist."""
    held_out = dict.fromkeys((7, 13, 18, 20, 23, 29, 34), "test")
    held_out |= dict.fromkeys((21, 25, 28), "validation")
    places = [split_of(row, "", 0, SPLIT) for row in IDS[:40]]
    assert places == [held_out.get(row, "train") for row in range(40)]
    assert order_of("cat/1.png", "cat/1.png", 7, SPLIT) == 1012560258427297323


def test_splits_have_their_shares_and_change_with_the_seed() -> None:
    splits = [split_of(row, "", 0, SPLIT) for row in IDS]
    shares = {split: count / len(IDS) for split, count in Counter(splits).items()}
    assert shares == pytest.approx({"train": 0.7, "validation": 0.1, "test": 0.2}, abs=0.01)
    again = [split_of(row, "", 1, SPLIT) for row in IDS]
    assert 0.4 < np.mean([a == b for a, b in zip(splits, again, strict=True)]) < 0.7


def test_a_larger_test_share_only_adds_test_rows() -> None:
    larger = SplitSpec(validation=0.1, test=0.3)
    for row in IDS[:2000]:
        if split_of(row, "", 0, SPLIT) == "test":
            assert split_of(row, "", 0, larger) == "test"


def test_test_files_are_the_test_split_and_validation_comes_from_the_others() -> None:
    split = SplitSpec(test_files="t10k*", validation=0.1)
    assert {split_of(row, "t10k-images", 0, split) for row in IDS} == {"test"}
    splits = Counter(split_of(row, "train-images", 0, split) for row in IDS)
    assert set(splits) == {"train", "validation"}
    assert splits["validation"] / len(IDS) == pytest.approx(0.1, abs=0.01)


def test_neighbours_do_not_stay_neighbours() -> None:
    train = [row for row in IDS if split_of(row, "", 0, SPLIT) == "train"]
    shuffled = sorted(range(len(train)), key=lambda index: order_of(train[index], "", 0, SPLIT))
    steps = np.abs(np.diff(shuffled))
    assert np.mean(steps) == pytest.approx(len(train) / 3, rel=0.05)
    assert np.mean(steps == 1) < 0.001


@given(st.tuples(*[st.integers(1, 9)] * 3))
def test_cut_points_part_the_splits_evenly(counts: tuple[int, int, int]) -> None:
    num_shards = dict(zip(("train", "validation", "test"), counts, strict=True))
    cuts = cut_points(num_shards)
    assert cuts == sorted(set(cuts))
    assert (cuts[0], cuts[-1]) == (0, REJECTED)
    assert Counter(split_at(cut) for cut in cuts[:-1]) == num_shards


def test_equal_rows_give_equal_bytes_however_they_are_chunked() -> None:
    rows = range(3000)
    images = pa.array([bytes([row % 256]) * 784 for row in rows], pa.binary(784))
    whole = pa.table({"id": [str(row) for row in rows], "image": images})
    parts = pa.concat_tables([whole.slice(start, 700) for start in range(0, 3000, 700)])
    assert write_shard(whole, 2048) == write_shard(parts, 2048)


def test_row_groups_hold_the_rows_in_order(store: Store, manifest: Manifest) -> None:
    shard = manifest.shards[0]
    groups = [read_group(store, shard, index) for index in range(len(shard.groups))]
    assert [group.num_rows for group in groups] == [40, 40, 20]
    assert pa.concat_tables(groups)["id"].to_pylist() == [f"row-{row}" for row in range(100)]
    assert pq.read_table(Path(store.uri) / shard.key).equals(pa.concat_tables(groups))


def test_table_columns_come_back_with_what_is_missing(store: Store) -> None:
    numbers = pack_rows(np.array([[1.5], [np.nan]]))
    table = pa.table({"id": ["a", "b"], "numbers": numbers, "x.c": [None, "ü"]})
    data, footer, groups = write_shard(table, 10)
    store.write("shard", data)
    shard = Shard("shard", "train", 2, len(data), "", footer, groups)
    features = TableFeatures((NumericColumn("n", 0, 1, True), CategoryColumn("c", ("ü",))))
    columns = to_columns(features, read_group(store, shard, 0))
    assert encode(features, columns)[0].tolist() == [[1.5, 0, 0, 1], [0, 1, 1, 0]]


def test_a_flipped_byte_is_refused_by_the_name_of_its_part(
    store: Store, manifest: Manifest
) -> None:
    shard = manifest.shards[0]
    data = store.read(shard.key)
    group = shard.groups[1]
    for position in range(group.offset, group.offset + group.bytes, 7):
        store.write(shard.key, flip(data, position))
        with pytest.raises(HeliostatError, match=f"row group 1 of .*{shard.key}"):
            read_group(store, shard, 1)
    assert read_group(store, shard, 0).num_rows == 40


def test_spans_cover_a_shard_and_stay_within_the_limits(store: Store, manifest: Manifest) -> None:
    shard = manifest.shards[0]  # of 40, 40 and 20 rows
    for max_rows, max_bytes, sizes in [
        (100, 10**9, [100]),
        (99, 10**9, [80, 20]),
        (60, 10**9, [40, 60]),
        (1, 10**9, [40, 40, 20]),
        (100, shard.groups[0].bytes, [40, 40, 20]),
    ]:
        spans = list(cut_spans(shard, max_rows, max_bytes))
        assert [span.rows for span in spans] == sizes
        whole = pa.concat_tables([read_span(store, span) for span in spans])
        groups = [read_group(store, shard, index) for index in range(3)]
        assert whole.equals(pa.concat_tables(groups))


def test_what_the_network_garbles_is_read_again(store: Store, manifest: Manifest) -> None:
    garbling = GarblingStore(store.uri)
    groups = [read_group(garbling, manifest.shards[0], index) for index in range(3)]
    assert groups == [read_group(store, manifest.shards[0], index) for index in range(3)]
    assert len(garbling.seen) == 3


def test_stock_pyarrow_returns_a_wrong_value_where_we_refuse(store: Store) -> None:
    """Page checksums are in the file, but nobody looks at them unless asked."""
    table = pa.table({"id": ["a", "b"], "x.n": np.random.default_rng(0).random(2)})
    data, footer, groups = write_shard(table, 10)
    shard = Shard("shard.parquet", "train", 2, len(data), "", footer, groups)
    wrong = 0
    for position in range(groups[0].offset, groups[0].offset + groups[0].bytes):
        store.write(shard.key, flip(data, position))
        with contextlib.suppress(OSError, pa.ArrowException):
            wrong += not pq.read_table(Path(store.uri) / shard.key).equals(table)
        with pytest.raises(HeliostatError):
            read_group(store, shard, 0)
    assert wrong


@pytest.mark.parametrize("length", [0, 1, -1, None])
def test_a_cut_empty_or_missing_shard_is_refused_by_name(
    store: Store, manifest: Manifest, length: int | None
) -> None:
    shard = manifest.shards[-1]
    check_shards(store, manifest)
    data = store.read(shard.key)
    if length is None:
        store.delete(shard.key)
    else:
        store.write(shard.key, data[:length])
    with pytest.raises(HeliostatError, match=shard.key):
        check_shards(store, manifest)
    if length == -1:  # of the footer, which the manifest has: all rows are there
        assert read_group(store, shard, 0).num_rows == shard.groups[0].rows
        return
    with pytest.raises(HeliostatError, match=shard.key):
        read_group(store, shard, 0)


def flip(data: bytes, position: int) -> bytes:
    damaged = bytearray(data)
    damaged[position] ^= 1
    return bytes(damaged)
