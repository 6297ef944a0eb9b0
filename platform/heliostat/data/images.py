"""Images as raw data: files in class folders, and IDX files as MNIST has them."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from heliostat.data.features import IMAGE
from heliostat.data.pixels import (
    BROKEN_IMAGE,
    STORED,
    decode_image,
    fit_image,
    list_formats,
    open_image,
)
from heliostat.data.raw import (
    Form,
    Found,
    ImageLayout,
    Source,
    Survey,
    Unit,
    folder_of,
    group_files,
    open_raw,
    raw_rows,
    sort_labels,
)
from heliostat.errors import HeliostatError
from heliostat.spec import DataSpec
from heliostat.storage import Entry, Store

HEADER_BYTES = 64 * 1024
BATCH_BYTES = 16 * 1024 * 1024
PARALLEL_READS = 8
FEW_FILES = 16
ORIENTATION = 0x0112
GREY_MODES = ("1", "L", "LA", "I", "I;16")
MAX_SIDE, MIN_SIDE, SIDE_STEP = 64, 16, 8
MAX_UNIFORM_PIXELS = 256 * 256
IDX_UBYTE = 8
MAX_IDX_SIDE = 16_384
IDX_KIND = re.compile(r"(images|labels)[^/]*$")

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Header:
    height: int
    width: int
    mode: str


def _rows_per_batch(layout: ImageLayout) -> int:
    return max(1, BATCH_BYTES // (layout.height * layout.width * layout.channels))


# --- Files in class folders ----------------------------------------------------------------------


def _survey_files(store: Store, unit: Unit, data: DataSpec) -> Found:
    """Sizes, colours and depths from the headers alone, and the largest value of a few deep ones.

    Where sizes and colours are known, a few headers tell enough.
    """
    is_known = data.image_size and data.channels
    files = unit["files"][:FEW_FILES] if is_known else unit["files"]
    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        heads = list(pool.map(lambda file: _read_header(store, *file), files))
    known = [head for head in heads if head]
    deep = [
        key
        for (key, _), head in zip(files, heads, strict=True)
        if head and head.mode.startswith("I")
    ]
    return {
        "sizes": list(Counter((head.height, head.width) for head in known).items()),
        "grey": sum(head.mode in GREY_MODES for head in known),
        "deep": len(deep),
        "highest": max((_find_highest(store, key) for key in deep[:FEW_FILES]), default=0),
    }


def _read_header(store: Store, key: str, size: int) -> Header | None:
    """None if the file is not a readable image."""
    for length in (min(size, HEADER_BYTES), size):
        try:
            with open_image(store.read_range(key, 0, length), formats=STORED) as image:
                upright = image.getexif().get(ORIENTATION, 1) < 5
                height, width = image.size[::-1] if upright else image.size
                return Header(height, width, image.mode)
        except BROKEN_IMAGE:
            continue
    return None


def _find_highest(store: Store, key: str) -> int:
    try:
        with open_image(store.read(key), formats=STORED) as image:
            return int(np.asarray(image).max())
    except BROKEN_IMAGE:
        return 0


def _settle_files(source: Source, found: list[Found], data: DataSpec) -> Survey:
    sizes = Counter[tuple[int, int]]()
    for part in found:
        sizes.update({tuple(size): count for size, count in part["sizes"]})
    grey, known = sum(part["grey"] for part in found), sizes.total()
    (height, width), why_size = _choose_size(sizes, data)
    channels, why_channels = _choose_channels(grey, known, data)
    labels = {folder_of(entry.key) for entry in source.entries} - {None}
    return Survey(
        ImageLayout(height, width, channels),
        sort_labels([label for label in labels if label], f"{source.store.uri} (a folder a class)"),
        len(source.entries),
        height * width * channels,
        (why_size, why_channels, *_describe_depth(found, known)),
    )


def _describe_depth(found: list[Found], known: int) -> Iterator[str]:
    deep, highest = sum(part["deep"] for part in found), max(part["highest"] for part in found)
    if deep:
        yield (
            f"{deep:,} of {known:,} images looked at {'has' if deep == 1 else 'have'} 16 bits a "
            f"pixel, and the upper 8 are kept: {highest:,}, the largest value there, is "
            f"{highest >> 8} of 255; stretch them to 65,535 first if that is too dark"
        )


def _choose_size(sizes: Counter[tuple[int, int]], data: DataSpec) -> tuple[tuple[int, int], str]:
    if data.image_size:
        height, width = data.image_size
        return data.image_size, f"image size {height}x{width} - as data.image_size says"
    if not sizes:
        raise HeliostatError(f"no image under {data.source} can be read as {list_formats(STORED)}")
    height, width = next(iter(sizes))
    if len(sizes) == 1 and height * width <= MAX_UNIFORM_PIXELS:
        return (height, width), f"image size {height}x{width} - all images have it"
    median = _median(Counter(min(size) for size in sizes.elements()))
    side = max(MIN_SIDE, min(MAX_SIDE, median // SIDE_STEP * SIDE_STEP))
    area = sorted(sizes, key=math.prod)
    return (side, side), (
        f"image size {side}x{side} - the median shorter side of {sizes.total():,} images from "
        f"{area[0][0]}x{area[0][1]} to {area[-1][0]}x{area[-1][1]} (height x width) is {median}, "
        f"in steps of {SIDE_STEP} from {MIN_SIDE} to {MAX_SIDE}; set data.image_size to change it"
    )


def _choose_channels(grey: int, known: int, data: DataSpec) -> tuple[int, str]:
    if data.channels:
        return data.channels, f"channels {data.channels} - as data.channels says"
    if grey == known:
        return 1, "channels 1 - all images are grey"
    return 3, f"channels 3 - {known - grey:,} of {known:,} images have colours"


def _median(counts: Counter[int]) -> int:
    return sorted(counts.elements())[counts.total() // 2]


def _read_files(store: Store, unit: Unit, layout: ImageLayout) -> Iterator[pa.Table]:
    keys = [key for key, _ in unit["files"]]
    size = _rows_per_batch(layout)
    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        for start in range(0, len(keys), size):
            batch = keys[start : start + size]
            decoded = list(pool.map(lambda key: _read_file(store, key, layout), batch))
            pixels, problems = zip(*decoded, strict=True)
            labels = [folder_of(key) for key in batch]
            payload = {IMAGE: pa.array(pixels, layout.fields[IMAGE])}
            yield raw_rows(layout, batch, batch, labels, problems, payload)


def _read_file(store: Store, key: str, layout: ImageLayout) -> tuple[bytes | None, str | None]:
    if layout.labelled and folder_of(key) is None:
        return None, "not in a class folder"
    size = layout.height, layout.width, layout.channels
    try:
        image = decode_image(store.read(key), *size, formats=STORED)
    except ValueError as error:
        return None, str(error)
    return image.tobytes(), None


# --- IDX -----------------------------------------------------------------------------------------


def _split_idx(source: Source) -> list[Unit]:
    """Pairs of an images and a labels file whose names differ in nothing else."""
    images, labels = _by_pair(source.entries, "images"), _by_pair(source.entries, "labels")
    lonely = {(images | labels)[pair] for pair in images.keys() ^ labels.keys()}
    for key in sorted(lonely | {e.key for e in source.entries if not IDX_KIND.search(e.key)}):
        raise HeliostatError(
            f"{source.store.uri}/{key} has no partner: an IDX data set is a pair of files such as "
            "train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz"
        )
    return [{"images": images[pair], "labels": labels[pair]} for pair in sorted(images)]


def _split_plain_idx(source: Source) -> list[Unit]:
    """The files of images; labels that lie beside them are not read."""
    units = [{"images": e.key} for e in source.entries if not _is_labels(e.key)]
    if not units:
        raise HeliostatError(f"{source.uri} has labels alone: give IDX files of images")
    return units


def _is_labels(key: str) -> bool:
    kind = IDX_KIND.search(key)
    return kind is not None and kind[1] == "labels"


def _by_pair(entries: tuple[Entry, ...], kind: str) -> dict[str, str]:
    matching = [entry.key for entry in entries if kind in entry.key.rpartition("/")[2]]
    return {re.sub(rf"{kind}|idx\d|\.gz$", "", key): key for key in matching}


def _survey_idx(store: Store, unit: Unit, data: DataSpec) -> Found:
    with open_raw(store, unit["images"]) as stream:
        count, *shape = _read_idx_header(store, unit["images"], stream, (3, 4))
    labels = _read_idx_labels(store, unit["labels"])
    if len(labels) != count:
        raise HeliostatError(
            f"{store.uri}/{unit['images']} has {count:,} images, "
            f"but {unit['labels']} has {len(labels):,} labels"
        )
    return {"rows": count, "shape": shape, "labels": np.unique(labels).tolist()}


def _settle_idx(source: Source, found: list[Found], data: DataSpec) -> Survey:
    shapes = {tuple(part["shape"]) for part in found}
    if len(shapes) > 1:
        listed = " and ".join("x".join(map(str, shape)) for shape in sorted(shapes))
        raise HeliostatError(f"{source.store.uri} has images of {listed}: give them one size each")
    height, width, channels = _arrange(shapes.pop(), source.store.uri).shape
    (height, width), why_size = _choose_size(Counter([(height, width)]), data)
    channels, why_channels = _choose_channels(int(channels == 1), 1, data)
    labels = {str(label) for part in found for label in part["labels"]}
    return Survey(
        ImageLayout(height, width, channels),
        sort_labels(labels, source.store.uri),
        sum(part["rows"] for part in found),
        height * width * channels,
        (why_size, why_channels),
    )


def _read_idx(store: Store, unit: Unit, layout: ImageLayout) -> Iterator[pa.Table]:
    key, size = unit["images"], _rows_per_batch(layout)
    labels = _read_idx_labels(store, unit["labels"]).astype(str) if layout.labelled else None
    with open_raw(store, key) as stream:
        count, *shape = _read_idx_header(store, key, stream, (3, 4))
        fit = _fit_to(_arrange(tuple(shape), f"{store.uri}/{key}"), layout)
        for start in range(0, count, size):
            rows = range(start, min(start + size, count))
            pixels = _read_pixels(store, key, stream, len(rows), math.prod(shape))
            images = [fit(image).tobytes() for image in pixels.reshape(len(rows), -1)]
            yield raw_rows(
                layout,
                [f"{key}#{row}" for row in rows],
                [key] * len(rows),
                [None] * len(rows) if labels is None else labels[start : start + size].tolist(),
                [None] * len(rows),
                {IMAGE: pa.array(images, layout.fields[IMAGE])},
            )


@dataclass(frozen=True)
class Arrangement:
    """How the pixels of an image (height, width, channels) lie in a file."""

    shape: tuple[int, int, int]
    channels_first: bool = False

    def read(self, flat: Pixels) -> Pixels:
        if not self.channels_first:
            return flat.reshape(self.shape)
        height, width, channels = self.shape
        return np.ascontiguousarray(flat.reshape(channels, height, width).transpose(1, 2, 0))


def _arrange(shape: tuple[int, ...], origin: str) -> Arrangement:
    """Of images (H, W), (H, W, C) or (C, H, W) with one or three channels.

    Raises:
        HeliostatError: these are others; `origin` is named.
    """
    if len(shape) == 2:
        return Arrangement((*shape, 1))
    if shape[2] in (1, 3):
        return Arrangement((shape[0], shape[1], shape[2]))
    if shape[0] in (1, 3):
        return Arrangement((shape[1], shape[2], shape[0]), channels_first=True)
    raise HeliostatError(
        f"{origin} has images of {'x'.join(map(str, shape))}: give them one or three channels, as "
        "the first or the last of their dimensions"
    )


def _fit_to(given: Arrangement, layout: ImageLayout) -> Callable[[Pixels], Pixels]:
    target = (layout.height, layout.width, layout.channels)
    if given.shape == target:
        return given.read
    grey = given.shape[2] == 1

    def fit(flat: Pixels) -> Pixels:
        image = given.read(flat)
        return fit_image(Image.fromarray(image[..., 0] if grey else image), *target)

    return fit


def _read_pixels(store: Store, key: str, stream: BinaryIO, rows: int, row_bytes: int) -> Pixels:
    data = stream.read(rows * row_bytes)
    if len(data) < rows * row_bytes:
        raise HeliostatError(f"{store.uri}/{key} ends early: it has fewer images than it says")
    return np.frombuffer(data, np.uint8)


def _read_idx_labels(store: Store, key: str) -> Pixels:
    with open_raw(store, key) as stream:
        (count,) = _read_idx_header(store, key, stream, (1,))
        labels = np.frombuffer(stream.read(count), np.uint8)
    if len(labels) < count:
        raise HeliostatError(f"{store.uri}/{key} ends early: it has fewer labels than it says")
    return labels


def _read_idx_header(
    store: Store, key: str, stream: BinaryIO, dimensions: tuple[int, ...]
) -> list[int]:
    """The size of each dimension: four bytes each, after two zeros, the type and their number."""
    magic = stream.read(4)
    if len(magic) < 4 or magic[:3] != bytes((0, 0, IDX_UBYTE)) or magic[3] not in dimensions:
        raise HeliostatError(
            f"{store.uri}/{key} is not an IDX file of bytes: {magic!r} at its start"
        )
    sizes = [int.from_bytes(stream.read(4), "big") for _ in range(magic[3])]
    if not all(0 < size <= MAX_IDX_SIDE for size in sizes[1:]):
        raise HeliostatError(f"{store.uri}/{key} is an IDX file with a damaged header: {sizes}")
    return sizes


FILES = Form(group_files, _survey_files, _settle_files, _read_files)
IDX = Form(_split_idx, _survey_idx, _settle_idx, _read_idx, split_plain=_split_plain_idx)
