"""Prepare images in a Ray of its own whose object store has 80 MB, and read them back.

`python small_store.py FOLDER ROWS FULLEST`: FULLEST is the share of its disk that Ray may use.
"""

import struct
import sys
from pathlib import Path

import numpy as np
import ray

from heliostat.data import stream
from heliostat.data.features import IMAGE
from heliostat.data.prepare import prepare
from heliostat.job import conclude
from heliostat.spec import parse
from heliostat.storage import connect

STORE_BYTES = 80 * 2**20


def main(folder: Path, rows: int, fullest: float) -> None:
    raw, root = folder / "raw", str(folder / "root")
    pixels = write_images(raw, rows)
    ray.init(
        num_cpus=2,
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        _system_config={"local_fs_capacity_threshold": fullest},
    )
    data = {"source": str(raw), "split": {"test": 0.1, "validation": 0.1}}
    manifest = prepare(
        parse({"name": "tiny", "root": root, "data": data, "model": {"kind": "mlp"}})
    )
    store = connect(root)
    order = stream.plan(manifest, "train", 256, 0)
    steps = range(order.steps_per_epoch)
    with stream.start_reader(store, manifest, "train", order, len(steps), 0.25) as reader:
        shares = stream.iter_shares(
            order, manifest, stream.fetch_from(reader), steps=steps, rank=0, world_size=1
        )
        sums = [share.columns[IMAGE].sum(dtype=np.int64) for share in shares]
    for split in ("validation", "test"):
        batches = stream.read_split(store, manifest, split, 256)
        sums += [batch[IMAGE].sum(dtype=np.int64) for batch in batches]
    assert sum(manifest.rows.values()) == rows
    assert sum(sums) == pixels
    print("every pixel came back")


def write_images(raw: Path, rows: int) -> int:
    """IDX files of `rows` random images; the sum of their pixels."""
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (rows, 28, 28), np.uint8)
    labels = (np.arange(rows) % 10).astype(np.uint8)
    head = struct.pack(">IIII", 0x803, rows, 28, 28)
    (raw / "train-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
    head = struct.pack(">II", 0x801, rows)
    (raw / "train-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    return int(pixels.sum(dtype=np.int64))


if __name__ == "__main__":
    sys.exit(conclude(lambda: main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))))
