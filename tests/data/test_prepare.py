"""The prepare job on a real cluster and bucket: exactly once, the same each time, or refused."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from datasets import unpack
from heliostat.data.encoding import encode
from heliostat.data.features import CategoryColumn, NumericColumn
from heliostat.data.instances import parse_instances
from heliostat.data.manifest import Manifest, Shard, check_shards, load_manifest
from heliostat.data.prepare import prepare, require_prepared, summarise
from heliostat.data.shards import order_of, read_group, split_of, to_columns, write_shard
from heliostat.errors import HeliostatError
from heliostat.signature import Classes
from heliostat.spec import RunSpec, parse
from heliostat.storage import Entry, Store, connect


def make_spec(root: str, **data: Any) -> RunSpec:
    source = {"source": f"{root}-raw"}
    return parse({"name": "tiny", "root": root, "data": source | data, "model": {"kind": "mlp"}})


def upload(spec: RunSpec, files: dict[str, bytes]) -> None:
    store = connect(spec.data.source)
    for key, data in files.items():
        store.write(key, data)


def listing(store: Store) -> list[Entry]:
    return list(store.list())


def read_shards(store: Store, manifest: Manifest, split: str) -> pa.Table:
    return pa.concat_tables(
        read_group(store, shard, index)
        for shard in manifest.shards_of(split)
        for index in range(len(shard.groups))
    )


def make_idx(rows: int, idx: Callable[[Any], bytes]) -> dict[str, bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (rows, 28, 28))
    return {
        "a/train-images-idx3-ubyte.gz": idx(pixels),
        "a/train-labels-idx1-ubyte.gz": idx(np.arange(rows) % 10),
    }


@pytest.mark.cluster
def test_every_row_is_in_one_shard_in_the_order_of_its_hash_whatever_the_parallelism(
    cluster: object, bucket: str, idx: Callable[[Any], bytes]
) -> None:
    from ray.data.context import DataContext

    files, rows = make_idx(6000, idx), 6000
    spec = make_spec(bucket, shard_mib=1, rows_per_group=100)
    upload(spec, files)
    store = connect(bucket)
    manifest = prepare(spec)
    assert len(manifest.shards_of("train")) == 4
    check_shards(store, manifest)

    key = "a/train-images-idx3-ubyte.gz"
    pixels = np.frombuffer(gzip.decompress(files[key])[16:], np.uint8).reshape(rows, -1)
    seen = []
    for split in ("train", "validation", "test"):
        table = read_shards(store, manifest, split)
        ids = table["id"].to_pylist()
        orders = [order_of(row, key, spec.data.seed, spec.data.split) for row in ids]
        assert orders == sorted(orders)
        assert {split_of(row, key, spec.data.seed, spec.data.split) for row in ids} == {split}
        numbers = [int(row.rpartition("#")[2]) for row in ids]
        assert table["label"].to_pylist() == [number % 10 for number in numbers]
        assert table["image"].to_pylist() == [pixels[number].tobytes() for number in numbers]
        assert manifest.rows[split] == len(ids)
        seen += numbers
    assert sorted(seen) == list(range(rows))

    (inputs,) = encode(
        manifest.features, to_columns(manifest.features, read_shards(store, manifest, "train"))
    )
    assert (inputs.mean(), inputs.std()) == pytest.approx((0, 1), abs=1e-4)

    context = DataContext.get_current().copy()
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        cpu=1
    )
    elsewhere = make_spec(f"{bucket}-2", **spec.data.model_dump())
    with DataContext.current(context):
        again = prepare(elsewhere)
    assert (again.version, again.shards) == (manifest.version, manifest.shards)


@pytest.mark.cluster
def test_preparing_again_writes_nothing_new(
    cluster: object, bucket: str, png: Callable[..., bytes]
) -> None:
    files = {f"{label}/{n}.png": png(colour=n) for label in ("ä", "b c") for n in range(20)}
    files["b c/broken.png"] = b"no image"
    spec = make_spec(bucket, max_bad_rows=1)
    upload(spec, files)
    store = connect(bucket)
    with pytest.raises(HeliostatError, match="was not prepared as tiny"):
        require_prepared(spec)
    with pytest.raises(HeliostatError, match=r"1 of 41 rows .*max_bad_rows is 0: b c/broken.png"):
        prepare(make_spec(bucket))
    manifest = prepare(spec)
    assert manifest.output == Classes(("b c", "ä"))
    assert sum(manifest.rows.values()) == 40
    assert "1 bad rows of 41" in summarise(manifest)
    report = json.loads(store.read(f"data/tiny/{manifest.version}/report.json"))
    assert [row for row, _ in report["examples"]] == ["b c/broken.png"]
    assert sum(rows["train"] for rows in report["rows_by_class"].values()) == manifest.rows["train"]

    before = listing(store)
    assert prepare(spec) == manifest == require_prepared(spec)
    assert load_manifest(store, "tiny", manifest.version) == manifest
    assert listing(store) == before

    same = make_spec(bucket, max_bad_rows=2)
    assert prepare(same).version == manifest.version
    assert len(set(listing(store)) - set(before)) == 1
    assert set(before) < set(listing(store))


@pytest.mark.cluster
def test_a_table_with_gaps_is_prepared_and_mended_and_answers_as_it_was_stored(
    cluster: object, bucket: str
) -> None:
    towns = ["Ulm", "Köln", ""]
    lines = [
        f"{row},{towns[row % 3]},{'' if row % 7 == 0 else row},p{row % 2}" for row in range(300)
    ]
    spec = make_spec(bucket, label="y", columns={"name": "category"})
    upload(spec, {"t.csv": "\n".join(["name,town,n,y", *lines]).encode()})
    store = connect(bucket)
    manifest = prepare(spec)
    assert any("column name is dropped" in note for note in manifest.report["notes"])
    report = json.loads(store.read(f"data/tiny/{manifest.version}/report.json"))
    assert report["notes"] == manifest.report["notes"]
    town, number = manifest.features.columns  # type: ignore[union-attr]
    assert town == CategoryColumn("town", ("Köln", "Ulm"))
    assert isinstance(number, NumericColumn)

    train = unpack(read_shards(store, manifest, "train"), "n")
    assert number.mean == pytest.approx(train["x.n"].to_pandas().mean())
    rows = [
        {"town": row["x.town"], "n": row["x.n"]}
        for row in train.select(["x.town", "x.n"]).to_pylist()
    ]
    asked = encode(manifest.features, parse_instances(manifest.features, list(rows)))
    stored = encode(manifest.features, to_columns(manifest.features, train))
    np.testing.assert_array_equal(asked, stored)

    store.delete(manifest.shards[0].key)
    store.write(manifest.shards[1].key, b"")
    with pytest.raises(HeliostatError, match="2 of 3 shards"):
        check_shards(store, manifest)
    assert prepare(spec) == manifest
    check_shards(store, manifest)


@pytest.mark.cluster
def test_a_file_that_ends_early_fails_by_its_name_and_leaves_no_version(
    cluster: object, bucket: str, idx: Callable[[Any], bytes]
) -> None:
    files = make_idx(50, idx)
    key = "a/train-images-idx3-ubyte.gz"
    files[key] = gzip.compress(gzip.decompress(files[key])[:-1])
    spec = make_spec(bucket)
    upload(spec, files)
    with pytest.raises(HeliostatError, match=f"{key} ends early"):
        prepare(spec)
    assert not [entry for entry in listing(connect(bucket)) if "manifest" in entry.key]


@pytest.mark.cluster
def test_stock_ray_data_loses_the_rows_of_an_empty_shard_that_we_refuse(
    cluster: object, tmp_path: Path
) -> None:
    import ray

    from datasets import store_images

    store = connect(str(tmp_path))
    manifest = store_images(store, {"train": 20}, rows_per_shard=10)
    store.write(manifest.shards[0].key, b"")
    assert ray.data.read_parquet(str(tmp_path / "data/tiny/shards")).count() == 10
    with pytest.raises(HeliostatError, match=manifest.shards[0].key):
        check_shards(store, manifest)


@pytest.mark.cluster
def test_stock_ray_data_returns_wrong_values_from_a_damaged_shard_that_we_refuse(
    cluster: object, tmp_path: Path
) -> None:
    import ray

    table = pa.table({"id": ["a", "b"], "x.n": [0.1, 0.7]})
    data, footer, groups = write_shard(table, 10)
    shard = Shard("shard.parquet", "train", 2, len(data), "", footer, groups)
    store = connect(str(tmp_path))
    damaged = data.replace(np.float64(0.7).tobytes(), np.float64(0.6).tobytes())
    assert damaged != data
    store.write(shard.key, damaged)
    rows = ray.data.read_parquet(f"{tmp_path}/shard.parquet").take_all()
    assert [row["x.n"] for row in rows] == [0.1, 0.6]
    with pytest.raises(HeliostatError, match=r"row group 0 of .*shard.parquet"):
        read_group(store, shard, 0)


def test_a_root_inside_the_source_is_refused(tmp_path: Path) -> None:
    spec = make_spec(str(tmp_path / "root"), source=str(tmp_path))
    (tmp_path / "a.csv").write_bytes(b"a,y\n1,p\n2,q\n")
    with pytest.raises(HeliostatError, match=r"lies inside data\.source"):
        prepare(spec)


@pytest.mark.cluster
def test_a_source_of_one_object_may_lie_at_the_top_of_the_root(
    cluster: object, bucket: str
) -> None:
    spec = make_spec(bucket, source=f"{bucket}/t.csv", label="y")
    store = connect(bucket)
    store.write("t.csv", b"a,y\n" + b"1,p\n2,q\n" * 20)
    manifest = prepare(spec)
    assert manifest.source == f"{bucket}/t.csv"

    [pointer] = store.list("data/tiny/inputs/")
    store.write(pointer.key, b"{")
    with pytest.raises(HeliostatError, match="run the prepare job first"):
        require_prepared(spec)
    assert prepare(spec) == manifest == require_prepared(spec)


@pytest.mark.cluster
def test_of_two_classes_the_one_that_is_sought_comes_last(cluster: object, bucket: str) -> None:
    rows = b"n,y\n" + b"".join(b"%d,%s\n" % (i, (b"buy", b"view")[i % 2]) for i in range(60))
    spec = make_spec(bucket, label="y", positive="buy")
    upload(spec, {"t.csv": rows})
    manifest = prepare(spec)
    assert manifest.output == Classes(("view", "buy"))
    assert "2 classes: view, buy; buy is the positive one" in summarise(manifest)
    other = prepare(make_spec(bucket, label="y"))
    assert other.output == Classes(("buy", "view"))
    with pytest.raises(
        HeliostatError, match=r"positive is 'bought', but the data has .* buy, view"
    ):
        prepare(make_spec(bucket, label="y", positive="bought"))


@pytest.mark.cluster
def test_a_table_of_what_was_liked_alone_is_refused(cluster: object, bucket: str) -> None:
    rows = b"user,item,click\n" + b"".join(b"%d,%d,1\n" % (i % 7, i) for i in range(60))
    ids = {"user": "id", "item": "id"}
    spec = make_spec(bucket, label="click", columns=ids, task="regression")
    upload(spec, {"t.csv": rows})
    with pytest.raises(HeliostatError, match=r"label click is 1 in all training rows, .* add rows"):
        prepare(spec)
