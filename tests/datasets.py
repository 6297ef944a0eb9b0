"""Small prepared data sets, stored without a pipeline."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa

from heliostat.data.features import NUMBERS, ImageFeatures
from heliostat.data.manifest import REPORTED, Manifest, Shard, content_version, data_key
from heliostat.data.shards import WEIGHT, row_bytes, write_shard
from heliostat.signature import Classes
from heliostat.storage import Store

SIDE = 4


def store_images(
    store: Store,
    rows: dict[str, int],
    *,
    rows_per_shard: int = 64,
    rows_per_group: int = 16,
    weighted: bool = False,
) -> Manifest:
    """A data set of grey 4x4 images whose first pixels spell the row number; two classes.

    Rows weigh 1, or with `weighted` what `row_weight` says.
    """
    shards = []
    first = 0
    for split, count in rows.items():
        for start in range(first, first + count, rows_per_shard):
            stop = min(start + rows_per_shard, first + count)
            numbers = range(start, stop)
            shards.append(_store_shard(store, split, numbers, rows_per_group, weighted))
        first += count
    manifest = Manifest(
        name="tiny",
        version="",
        source="raw/tiny",
        format="images",
        schema={"id": "string", "label": "int32", "image": f"uint8[{SIDE}x{SIDE}x1]"},
        output=Classes(("even", "odd")),
        rows=rows,
        features=ImageFeatures(SIDE, SIDE, 1, (0.0,), (1 / 255,)),
        shards=tuple(shards),
        spec={},
        report=dict.fromkeys(REPORTED, 0),
    )
    manifest = replace(manifest, version=content_version(manifest))
    key = data_key(manifest.name, manifest.version, "manifest.json")
    store.write(key, json.dumps(manifest.to_json()).encode())
    return manifest


def unpack(rows: pa.Table, *names: str) -> pa.Table:
    """Rows of a table with a column `x.name` for each of their numbers, None where missing."""
    numbers = row_bytes(rows, NUMBERS).view(np.float64)
    for name, column in zip(names, numbers.T, strict=True):
        rows = rows.append_column(f"x.{name}", pa.array(column, from_pandas=True))
    return rows


def row_numbers(pixels: np.ndarray) -> list[int]:
    """The row numbers that images of `store_images` spell."""
    flat = pixels.reshape(len(pixels), SIDE * SIDE).astype(int)
    return [int(row[0] + (row[1] << 8)) for row in flat]


def row_weight(number: int) -> int:
    return number % 3


def _store_shard(
    store: Store, split: str, numbers: range, rows_per_group: int, weighted: bool
) -> Shard:
    images = np.zeros((len(numbers), SIDE * SIDE), np.uint8)
    images[:, 0] = [number & 255 for number in numbers]
    images[:, 1] = [number >> 8 for number in numbers]
    images[:, 2] = [255 * (number % 2) for number in numbers]
    table = pa.table(
        {
            "id": [f"row-{number}" for number in numbers],
            "label": pa.array([number % 2 for number in numbers], pa.int32()),
            "image": pa.array([image.tobytes() for image in images], pa.binary(SIDE * SIDE)),
        }
    )
    if weighted:
        weights = pa.array([row_weight(number) for number in numbers], pa.int32())
        table = table.append_column(WEIGHT, weights)
    data, footer, groups = write_shard(table, rows_per_group)
    sha256 = hashlib.sha256(data).hexdigest()
    key = f"data/tiny/shards/{sha256}.parquet"
    etag = store.write(key, data)
    return Shard(key, split, len(numbers), len(data), sha256, footer, groups, etag)
