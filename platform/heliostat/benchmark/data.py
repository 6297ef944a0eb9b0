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
SHARDS, ROWS_PER_SHARD, ROWS_PER_GROUP = 16, 4096, 1024
BATCH = 256
EPOCHS, WARM_UP = 8, 1

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Reading:
    """How fast a reader was: `rows_per_second` counts after the epochs of WARM_UP.

    A reader that starts slowly has read ahead by its first batch; that is not its speed.
    """

    rows: int
    first_batch_seconds: float
    rows_per_second: float


def measure(
    root: str, repeats: int, report: Callable[[str, Reading], None]
) -> dict[str, Reading | None]:
    """Read 65,536 images of 32x32x3 eight times with every reader in turn, the best of `repeats`.

    All give batches of 256 images (uint8) and labels (int64) as tensors to one process. Heliostat
    verifies SHA-256 and page checksums and shuffles; the others take the stored order on trust. A
    reader that is not installed is None.
    """
    store = storage.connect(root)
    manifest = store_images(store)
    readers: dict[str, Callable[[], Batches] | None] = {
        "heliostat": partial(read_heliostat, store, manifest),
        "ray_data": partial(read_ray_data, store, manifest),
        "pyarrow": partial(read_pyarrow, store, manifest),
        "mosaicml": None,
    }
    if importlib.util.find_spec("streaming"):
        readers["mosaicml"] = partial(read_mosaic, store_mosaic(store, manifest))
    found: dict[str, Reading | None] = dict.fromkeys(readers)
    for _ in range(repeats):
        for name, read in readers.items():
            if read is None:
                continue
            reading = time_reader(read())
            report(name, reading)
            best = found[name]
            if best is None or reading.rows_per_second > best.rows_per_second:
                found[name] = reading
    return found


def time_reader(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Reading:
    """Take every batch; each row is looked at once, so that a lazy batch is no fast one."""
    began = warm = time.perf_counter()
    rows = warm_rows = 0
    first = 0.0
    for images, labels in batches:
        assert images.shape == (len(labels), PIXELS)
        images[:, 0].sum()
        rows += len(labels)
        first = first or time.perf_counter() - began
        if not warm_rows and rows >= WARM_UP * SHARDS * ROWS_PER_SHARD:
            warm, warm_rows = time.perf_counter(), rows
    assert rows == EPOCHS * SHARDS * ROWS_PER_SHARD
    return Reading(rows, first, (rows - warm_rows) / (time.perf_counter() - warm))


def store_images(store: Store) -> Manifest:
    """Random images as a prepared data set; the same every time, and stored once."""
    manifest = Manifest(
        name=NAME,
        version="",
        source="random",
        format="images",
        schema={},
        output=Classes(tuple(map(str, range(CLASSES)))),
        rows={"train": SHARDS * ROWS_PER_SHARD},
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


def read_heliostat(store: Store, manifest: Manifest) -> Batches:
    """As a training worker reads: through one pipeline, verified and in shuffled order."""
    order = stream.plan(manifest, "train", BATCH, seed=0)
    reader: Any = ray.remote(stream.ChunkReader).options(num_cpus=0)
    steps = EPOCHS * order.steps_per_epoch
    actor = reader.remote(store, manifest, "train", order, steps)
    try:
        for share in stream.iter_shares(
            order,
            manifest,
            stream.fetch_from(actor),
            steps=range(steps),
            rank=0,
            world_size=1,
        ):
            images = torch.from_numpy(share.columns[IMAGE]).view(-1, PIXELS)
            yield images, torch.from_numpy(share.columns["label"].astype(np.int64))
    finally:
        ray.kill(actor)


def read_ray_data(store: Store, manifest: Manifest) -> Batches:
    """Plain Ray Data over the same shards, as its guide says: read_parquet, iter_torch_batches."""

    def to_arrays(batch: pa.Table) -> dict[str, np.ndarray[Any, Any]]:
        return {IMAGE: image_bytes(batch), "label": batch["label"].to_numpy().astype(np.int64)}

    stream.configure(ray.data.DataContext.get_current())
    with _file_system(store) as (files, base):
        paths = [f"{base}/{shard.key}" for shard in manifest.shards]
        dataset = ray.data.read_parquet(paths, filesystem=files, columns=["label", IMAGE])
        epochs = dataset.union(*[dataset] * (EPOCHS - 1))
        arrays = epochs.map_batches(to_arrays, batch_format="pyarrow", batch_size=None)
        for batch in arrays.iter_torch_batches(batch_size=BATCH):
            yield batch[IMAGE], batch["label"]


def read_pyarrow(store: Store, manifest: Manifest, epochs: int = EPOCHS) -> Batches:
    """One thread, row group by row group."""
    with _file_system(store) as (files, base):
        for shard in epochs * manifest.shards:
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
                for images, labels in read_pyarrow(store, manifest, epochs=1):
                    for image, label in zip(images.numpy(), labels.tolist(), strict=True):
                        writer.write({IMAGE: image.tobytes(), "label": label})
            storage.upload_folder(Path(local), storage.connect(f"{store.uri}/{folder}"), print)
    return f"{store.uri}/{folder}"


def read_mosaic(uri: str) -> Batches:
    """One worker in this process, its own shuffle off."""
    from streaming import StreamingDataset

    os.environ.setdefault("S3_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT_URL", ""))
    with tempfile.TemporaryDirectory() as local:
        dataset = StreamingDataset(remote=uri, local=local, batch_size=BATCH, shuffle=False)
        loader = torch.utils.data.DataLoader(dataset, BATCH, collate_fn=_collate)
        for _ in range(EPOCHS):
            yield from loader


def _collate(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
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
