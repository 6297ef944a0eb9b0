"""Rows per second from the bucket to tensors: Heliostat, Ray Data, MosaicML Streaming, PyArrow."""

import hashlib
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import ray
import ray.data
import torch

from heliostat import storage
from heliostat.data import stream
from heliostat.data.features import IMAGE, ImageFeatures
from heliostat.data.manifest import Manifest, Shard, content_version, data_key
from heliostat.data.shards import image_bytes, write_shard
from heliostat.signature import Classes
from heliostat.storage import Store

NAME = "benchmark"
SIDE, CHANNELS, CLASSES = 32, 3, 10
PIXELS = SIDE * SIDE * CHANNELS
SHARDS, ROWS_PER_SHARD, ROWS_PER_GROUP = 64, 4096, 1024
ROWS = SHARDS * ROWS_PER_SHARD
BATCH = 256
EPOCHS = 3
ENOUGH_SECONDS = 60.0
LONG = 12  # epochs' worth of rows: several times what the cluster's memory can hold ahead
CACHE_SHARE = 0.25  # as the spec of a run has it

Batch = tuple[torch.Tensor, torch.Tensor]
Epochs = Iterable[Iterable[Batch]]


@dataclass(frozen=True)
class Reading:
    """How fast a reader was: `rows_per_second` over all epochs but the first.

    `sustained_rows_per_second` is of the second half of one pass over LONG times the rows: without
    what an epoch costs to begin, and after what was read ahead before the first batch is used up.
    It is None for readers that begin no pipeline.
    """

    first_batch_seconds: float
    rows_per_second: float
    sustained_rows_per_second: float | None = None


def measure(
    root: str, repeats: int, report: Callable[[str, Reading], None]
) -> dict[str, Reading | None]:
    """Read 262,144 images of 32x32x3 with every reader in turn, the best of `repeats`.

    All give batches of 256 images (uint8) and labels (int64) as tensors to one process. Heliostat
    verifies SHA-256 and page checksums and shuffles; the others take the stored order on trust. A
    reader that is not installed is None.
    """
    store = storage.connect(root)
    manifest = store_images(store)
    readers: dict[str, Callable[[], Epochs] | None] = {
        "heliostat": partial(read_heliostat, store, manifest, EPOCHS),
        "heliostat_cached": partial(read_heliostat, store, manifest, EPOCHS, CACHE_SHARE),
        "ray_data": partial(read_ray_data, store, manifest, EPOCHS),
        "pyarrow": partial(read_pyarrow, store, manifest),
        "mosaicml": None,
    }
    if importlib.util.find_spec("streaming"):
        readers["mosaicml"] = partial(read_mosaic, store_mosaic(store, manifest))
    passes = {
        "heliostat": partial(read_heliostat, store, manifest, LONG),
        "ray_data": partial(read_ray_data, store, manifest, 1, LONG),
    }
    found: dict[str, Reading | None] = dict.fromkeys(readers)
    for _ in range(repeats):
        for name, read in readers.items():
            if read is None:
                continue
            reading = time_reader(read())
            if name in passes:
                sustained = time_pass(chain.from_iterable(passes[name]()))
                reading = replace(reading, sustained_rows_per_second=sustained)
            report(name, reading)
            found[name] = best_of(found[name], reading)
    return found


def best_of(one: Reading | None, other: Reading) -> Reading:
    """Each figure of the better of two: only the first reading waits for processes to start."""
    if one is None:
        return other
    return Reading(
        min(one.first_batch_seconds, other.first_batch_seconds),
        max(one.rows_per_second, other.rows_per_second),
        max(one.sustained_rows_per_second or 0, other.sustained_rows_per_second or 0) or None,
    )


def time_reader(epochs: Epochs) -> Reading:
    """Take all batches of EPOCHS epochs, or so many epochs as begin within ENOUGH_SECONDS."""
    began = time.perf_counter()
    first, seconds = [], []
    for epoch in epochs:
        epoch_began = first_batch = time.perf_counter()
        rows = 0
        for images, labels in epoch:
            look_at(images, labels)
            if not rows:
                first_batch = time.perf_counter()
            rows += len(labels)
        ended = time.perf_counter()
        assert rows == ROWS
        first.append(first_batch - epoch_began)
        seconds.append(ended - epoch_began)
        if ended - began > ENOUGH_SECONDS:
            break
    steady = slice(1, None) if len(seconds) > 1 else slice(None)
    return Reading(first[0], ROWS * len(seconds[steady]) / sum(seconds[steady]))


def time_pass(batches: Iterable[Batch]) -> float:
    """Rows per second in the second half of LONG * ROWS rows."""
    rows, half = 0, 0.0
    for images, labels in batches:
        look_at(images, labels)
        rows += len(labels)
        if not half and rows >= LONG * ROWS // 2:
            half, counted = time.perf_counter(), rows
    assert rows == LONG * ROWS
    return (rows - counted) / (time.perf_counter() - half)


def look_at(images: torch.Tensor, labels: torch.Tensor) -> None:
    """Touch each row, lest a lazy batch be a fast one."""
    assert images.shape == (len(labels), PIXELS)
    images[:, 0].sum()


def store_images(store: Store) -> Manifest:
    """Random images as a prepared data set; the same every time, and stored once."""
    manifest = Manifest(
        name=NAME,
        version="",
        source="random",
        format="images",
        schema={},
        output=Classes(tuple(map(str, range(CLASSES)))),
        rows={"train": ROWS},
        features=ImageFeatures(SIDE, SIDE, CHANNELS, (0.5,) * CHANNELS, (0.25,) * CHANNELS),
        shards=tuple(_store_shard(store, number) for number in range(SHARDS)),
        spec={},
        report={},
    )
    return replace(manifest, version=content_version(manifest))


def _store_shard(store: Store, number: int) -> Shard:
    random = np.random.default_rng(number)
    pixels = random.integers(0, 256, (ROWS_PER_SHARD, PIXELS), np.uint8)
    labels = random.integers(0, CLASSES, ROWS_PER_SHARD).astype(np.int32)
    images = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(PIXELS), ROWS_PER_SHARD, [None, pa.py_buffer(pixels.tobytes())]
    )
    data, footer, groups = write_shard(pa.table({"label": labels, IMAGE: images}), ROWS_PER_GROUP)
    sha256 = hashlib.sha256(data).hexdigest()
    key = data_key(NAME, "shards", f"{sha256}.parquet")
    if store.stat(key) is None:
        store.write(key, data)
    return Shard(key, "train", ROWS_PER_SHARD, len(data), sha256, footer, groups)


def read_heliostat(
    store: Store, manifest: Manifest, epochs: int, cache_share: float = 0.0
) -> Iterator[Iterable[Batch]]:
    """As a training worker reads: through one pipeline, verified and in shuffled order.

    Every epoch from the bucket, or with a `cache_share` the first one alone.
    """
    order = stream.plan(manifest, "train", BATCH, seed=0)
    steps = epochs * order.steps_per_epoch
    with stream.start_reader(store, manifest, "train", order, steps, cache_share) as reader:
        fetch = stream.fetch_from(reader)
        shares = stream.iter_shares(
            order, manifest, fetch, steps=range(steps), rank=0, world_size=1
        )
        for _ in range(epochs):
            yield map(_to_tensors, islice(shares, order.steps_per_epoch))


def _to_tensors(share: stream.Share) -> Batch:
    images = torch.from_numpy(share.columns[IMAGE]).view(-1, PIXELS)
    return images, torch.from_numpy(share.columns["label"].astype(np.int64))


def read_ray_data(
    store: Store, manifest: Manifest, epochs: int, times: int = 1
) -> Iterator[Iterable[Batch]]:
    """Plain Ray Data over the same shards, as its guide says: `iter_torch_batches` every epoch.

    In each epoch all shards come so many `times`.
    """

    def to_arrays(batch: pa.Table) -> dict[str, np.ndarray[Any, Any]]:
        return {IMAGE: image_bytes(batch), "label": batch["label"].to_numpy().astype(np.int64)}

    stream.configure(ray.data.DataContext.get_current())
    with _file_system(store) as (files, base):
        paths = times * [f"{base}/{shard.key}" for shard in manifest.shards]
        dataset = ray.data.read_parquet(paths, filesystem=files, columns=["label", IMAGE])
        arrays = dataset.map_batches(to_arrays, batch_format="pyarrow", batch_size=None)
        for _ in range(epochs):
            batches = arrays.iter_torch_batches(batch_size=BATCH)
            yield ((batch[IMAGE], batch["label"]) for batch in batches)


def read_pyarrow(store: Store, manifest: Manifest) -> Iterator[Iterable[Batch]]:
    """One thread, row group by row group."""
    for _ in range(EPOCHS):
        yield _read_parquet(store, manifest)


def _read_parquet(store: Store, manifest: Manifest) -> Iterator[Batch]:
    with _file_system(store) as (files, base):
        for shard in manifest.shards:
            with files.open_input_file(f"{base}/{shard.key}") as source:
                batches = pq.ParquetFile(source).iter_batches(BATCH, use_threads=False)
                for batch in batches:
                    table = pa.Table.from_batches([batch])
                    labels = table["label"].to_numpy().astype(np.int64)
                    yield torch.from_numpy(image_bytes(table).copy()), torch.from_numpy(labels)


def store_mosaic(store: Store, manifest: Manifest) -> str:
    """The same rows in MosaicML's own format; the URI of the folder."""
    from streaming import MDSWriter

    folder = f"{NAME}/mds-{manifest.version}"
    if store.stat(f"{folder}/index.json") is None:
        with tempfile.TemporaryDirectory() as local:
            columns = {IMAGE: "bytes", "label": "int"}
            with MDSWriter(out=local, columns=columns, size_limit=1 << 24) as writer:
                for images, labels in _read_parquet(store, manifest):
                    for image, label in zip(images.numpy(), labels.tolist(), strict=True):
                        writer.write({IMAGE: image.tobytes(), "label": label})
            storage.upload_folder(Path(local), storage.connect(f"{store.uri}/{folder}"), print)
    return f"{store.uri}/{folder}"


def read_mosaic(uri: str) -> Iterator[Iterable[Batch]]:
    """One worker in this process, its own shuffle off."""
    from streaming import StreamingDataset

    os.environ.setdefault("S3_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT_URL", ""))
    with tempfile.TemporaryDirectory() as local:
        dataset = StreamingDataset(remote=uri, local=local, batch_size=BATCH, shuffle=False)
        loader = torch.utils.data.DataLoader(dataset, BATCH, collate_fn=_collate)
        for _ in range(EPOCHS):
            yield loader


def _collate(rows: list[dict[str, Any]]) -> Batch:
    pixels = np.frombuffer(b"".join(row[IMAGE] for row in rows), np.uint8).copy()
    labels = torch.tensor([row["label"] for row in rows])
    return torch.from_numpy(pixels.reshape(len(rows), PIXELS)), labels


@contextmanager
def _file_system(store: Store) -> Iterator[tuple[pyarrow.fs.FileSystem, str]]:
    """PyArrow's own file system for the store, and the path of the store in it."""
    if not store.uri.startswith("s3://"):
        yield pyarrow.fs.LocalFileSystem(), store.uri
        return
    endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL", ""))
    yield (
        pyarrow.fs.S3FileSystem(
            endpoint_override=endpoint.netloc or None, scheme=endpoint.scheme or "https"
        ),
        store.uri.removeprefix("s3://"),
    )
