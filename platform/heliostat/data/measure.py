"""Statistics of the training rows: measured shard by shard, then added up to features."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from heliostat.data.features import (
    IMAGE,
    TOKENS,
    BlockFeatures,
    CategoryColumn,
    Features,
    ImageFeatures,
    NumericColumn,
    TableFeatures,
    TextFeatures,
    token_type,
)
from heliostat.data.raw import ImageLayout, Layout, TextLayout
from heliostat.data.shards import COLUMN_PREFIX, fixed_bytes
from heliostat.data.tokens import Vocabulary, find_targets
from heliostat.errors import HeliostatError
from heliostat.spec import DataSpec

MAX_DISTINCT = 10_000
PART_ROWS = 1024 * 1024


def measure(layout: Layout, rows: pa.Table) -> dict[str, Any]:
    """Sums over the rows of one shard that can be added up, the same on every machine."""
    if isinstance(layout, ImageLayout):
        pixels = fixed_bytes(rows, IMAGE).reshape(-1, layout.channels)
        return {"histograms": [_count_values(channel).tolist() for channel in pixels.T]}
    if isinstance(layout, TextLayout):
        return _measure_tokens(layout, rows)
    return {
        name: _measure_numbers(column) if kind == "numeric" else _measure_texts(column)
        for name, kind in layout.kinds.items()
        for column in [rows[COLUMN_PREFIX + name]]
    }


def _count_values(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each of the 256 values occurs; in parts, as counting widens them to 8 bytes."""
    parts = range(0, len(pixels), PART_ROWS)
    counts = (np.bincount(pixels[start : start + PART_ROWS], minlength=256) for start in parts)
    return sum(counts, start=np.zeros(256, np.int64))


def _measure_tokens(layout: TextLayout, rows: pa.Table) -> dict[str, Any]:
    """How often each token is to be predicted, or how many texts fill a row."""
    vocabulary = _known(layout)
    if not layout.packed:
        lengths = np.asarray(rows[TOKENS].combine_chunks().value_lengths())
        return {"texts": len(lengths), "full": int((lengths == layout.block).sum())}
    blocks = fixed_bytes(rows, TOKENS).view(token_type(vocabulary.size))
    is_followed, following = find_targets(blocks, vocabulary.end)
    counts = np.bincount(following[is_followed], minlength=vocabulary.size)
    return {"counts": counts.tolist()}


def _known(layout: TextLayout) -> Vocabulary:
    assert layout.vocabulary is not None
    return layout.vocabulary


def _measure_numbers(column: pa.ChunkedArray) -> dict[str, Any]:
    values = column.drop_null().to_pylist()
    mean = math.fsum(values) / len(values) if values else 0.0
    return {
        "count": len(values),
        "mean": mean,
        "spread": math.fsum((value - mean) ** 2 for value in values),
        "range": [min(values), max(values)] if values else [],
        "missing": column.null_count,
    }


def _measure_texts(column: pa.ChunkedArray) -> dict[str, int]:
    return _most_common(Counter(column.drop_null().to_pylist()), MAX_DISTINCT)


def _most_common(counts: dict[str, int], number: int) -> dict[str, int]:
    """The most frequent ones, of equally frequent ones the first by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:number])


def settle_features(
    layout: Layout, statistics: list[dict[str, Any]], data: DataSpec
) -> tuple[Features, list[str]]:
    """Features from the measures of all training shards in order, and what is notable with reasons.

    Raises:
        HeliostatError: no column of a table carries anything.
    """
    if isinstance(layout, ImageLayout):
        return _settle_image(layout, statistics), []
    if isinstance(layout, TextLayout):
        return _settle_text(layout, statistics)
    columns, notes = [], []
    for name, kind in layout.kinds.items():
        parts = [part[name] for part in statistics]
        settle = _settle_numbers if kind == "numeric" else _settle_texts
        column, note = settle(name, parts, data)
        columns += [column] if column else []
        notes += [note] if note else []
    if not columns:
        raise HeliostatError(f"no column of {data.source} carries anything: {'; '.join(notes)}")
    return TableFeatures(tuple(columns)), notes


def unigram_nats(layout: Layout, statistics: list[dict[str, Any]]) -> float | None:
    """The loss of a model that knows only how often each token occurs; None without tokens."""
    if not isinstance(layout, TextLayout) or not layout.packed:
        return None
    counts = np.sum([part["counts"] for part in statistics], axis=0)
    shares = counts[counts > 0] / counts.sum()
    return math.fsum(-shares * np.log(shares))


def _settle_text(
    layout: TextLayout, statistics: list[dict[str, Any]]
) -> tuple[Features, list[str]]:
    known, length = _known(layout), layout.block
    nats = unigram_nats(layout, statistics)
    if nats is None:
        texts, full = (sum(part[name] for part in statistics) for name in ("texts", "full"))
        note = (
            f"{full:,} of {texts:,} training texts fill {length} tokens - data.text.block cuts them"
        )
        return TextFeatures(length, known.size, known.sha256), [note] if full else []
    total = sum(map(sum, (part["counts"] for part in statistics)))
    note = (
        f"unigram entropy {nats:.4f} nats per token - the loss of a model that knows only how "
        f"often each of the {total:,} predicted training tokens occurs"
    )
    features = BlockFeatures(length, known.size, known.end, known.sha256, known.token_bytes)
    return features, [note]


def _settle_image(layout: ImageLayout, statistics: list[dict[str, Any]]) -> ImageFeatures:
    channels = zip(*(part["histograms"] for part in statistics), strict=True)
    moments = [_moments([sum(counts) for counts in zip(*parts, strict=True)]) for parts in channels]
    mean, std = zip(*moments, strict=True)
    return ImageFeatures(layout.height, layout.width, layout.channels, mean, std)


def _moments(counts: list[int]) -> tuple[float, float]:
    """Mean and deviation of pixel / 255, in exact integers until the last step."""
    count = sum(counts)
    total = sum(value * times for value, times in enumerate(counts))
    squares = sum(value * value * times for value, times in enumerate(counts))
    variance = (count * squares - total * total) / count**2
    return total / count / 255, math.sqrt(variance) / 255 or 1.0


def _settle_numbers(
    name: str, parts: list[dict[str, Any]], data: DataSpec
) -> tuple[NumericColumn | None, str]:
    """Mean and deviation by Chan's rule for merging the moments of parts."""
    count, mean, spread = 0, 0.0, 0.0
    for part in parts:
        if part["count"]:
            total = count + part["count"]
            step = part["mean"] - mean
            spread += part["spread"] + step * step * count * part["count"] / total
            mean += step * part["count"] / total
            count = total
    if not count:
        return None, f"column {name} is dropped: it has no value in the training rows"
    has_missing = any(part["missing"] for part in parts)
    extremes = {bound for part in parts for bound in part["range"]}
    if len(extremes) == 1:  # the mean of equal numbers may be off by rounding
        (only,) = extremes
        note = f"column {name} has only the value {only:g} in the training rows"
        return NumericColumn(name, only, 1.0, has_missing), note
    return NumericColumn(name, mean, math.sqrt(spread / count) or 1.0, has_missing), ""


def _settle_texts(
    name: str, parts: list[dict[str, int]], data: DataSpec
) -> tuple[CategoryColumn | None, str]:
    counts = Counter[str]()
    for part in parts:
        counts = Counter(_most_common(counts + Counter(part), MAX_DISTINCT))
    kept = _most_common(counts, data.max_categories)
    if max(kept.values(), default=0) < 2:
        return None, f"column {name} is dropped: no value occurs twice in the training rows"
    rest = len(counts) - len(kept)
    note = (
        f"column {name}: {rest:,} rarer values share one input, as data.max_categories is "
        f"{data.max_categories}"
    )
    return CategoryColumn(name, tuple(sorted(kept))), note if rest else ""
