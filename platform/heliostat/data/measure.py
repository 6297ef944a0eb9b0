"""Statistics of the training rows: measured shard by shard, then added up to features."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from heliostat.data.features import (
    COLUMN_PREFIX,
    NUMBERS,
    TOKENS,
    BlockFeatures,
    CategoryColumn,
    Column,
    Features,
    IdColumn,
    ImageFeatures,
    NumericColumn,
    SeriesFeatures,
    TableFeatures,
    TextFeatures,
    token_type,
)
from heliostat.data.raw import (
    ImageLayout,
    Layout,
    SeriesLayout,
    TableLayout,
    TextLayout,
    choose_kind,
    sort_names,
)
from heliostat.data.shards import image_bytes, row_bytes, series_values
from heliostat.data.tokens import Vocabulary, find_targets
from heliostat.errors import HeliostatError
from heliostat.signature import Numbers
from heliostat.spec import MAX_CATEGORIES, DataSpec

MAX_DISTINCT = MAX_CATEGORIES  # a spec asks for no more
MAX_IDS = 4_000_000
PART_ROWS = 1024 * 1024


def measure(layout: Layout, rows: pa.Table) -> dict[str, Any]:
    """Sums over the rows of one shard that can be added up, the same on every machine."""
    match layout:
        case ImageLayout():
            pixels = image_bytes(rows).reshape(-1, layout.channels)
            return {"histograms": [_count_values(channel).tolist() for channel in pixels.T]}
        case SeriesLayout():
            steps = series_values(rows, layout.channels)
            return {"channels": measure_numbers(np.concatenate(steps).astype(np.float64))}
        case TableLayout():
            measured: dict[str, Any] = {}
            if layout.numeric:
                numbers = measure_numbers(row_bytes(rows, NUMBERS).view(np.float64))
                measured.update(zip(layout.numeric, numbers, strict=True))
            for name in layout.texts:
                texts = rows[COLUMN_PREFIX + name]
                is_id = layout.kinds[name] == "id"
                measured[name] = _list_ids(name, texts) if is_id else _count_texts(texts)
            return measured
        case TextLayout():
            return _measure_tokens(layout, rows)


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
    blocks = row_bytes(rows, TOKENS).view(token_type(vocabulary.size))
    is_followed, following = find_targets(blocks, vocabulary.end)
    counts = np.bincount(following[is_followed], minlength=vocabulary.size)
    return {"counts": counts.tolist()}


def _known(layout: TextLayout) -> Vocabulary:
    assert layout.vocabulary is not None
    return layout.vocabulary


def measure_numbers(values: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Moments by column of (rows, columns), NaN where missing.

    numpy adds such columns up row by row, in the same order whatever the machine's vectors are.
    """
    known = ~np.isnan(values)
    counts = known.sum(axis=0)
    means = np.where(known, values, 0.0).sum(axis=0) / np.maximum(counts, 1)
    spreads = (np.where(known, values - means, 0.0) ** 2).sum(axis=0)
    lowest = values.min(axis=0, where=known, initial=np.inf)
    highest = values.max(axis=0, where=known, initial=-np.inf)
    return [
        {
            "count": count,
            "mean": mean,
            "spread": spread,
            "range": [low, high] if count else [],
            "missing": len(values) - count,
        }
        for count, mean, spread, low, high in zip(
            *(part.tolist() for part in (counts, means, spreads, lowest, highest)), strict=True
        )
    ]


def _count_texts(column: pa.ChunkedArray) -> dict[str, int]:
    return _most_common(Counter(column.drop_null().to_pylist()), MAX_DISTINCT)


def _list_ids(name: str, column: pa.ChunkedArray) -> list[str]:
    values: list[str] = column.drop_null().unique().to_pylist()
    _check_ids(name, len(values))
    return values


def _check_ids(name: str, count: int) -> None:
    if count > MAX_IDS:
        raise HeliostatError(
            f"the id column {name} has more than {MAX_IDS:,} values, and each needs an embedding: "
            f"put the rare ones together, or set {choose_kind(name, 'ignore')}"
        )


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
    if isinstance(layout, SeriesLayout):
        return _settle_series(layout, statistics)
    if isinstance(layout, TextLayout):
        return _settle_text(layout, statistics)
    settled = {
        name: SETTLERS[kind](name, [part[name] for part in statistics], data)
        for name, kind in layout.kinds.items()
    }
    columns = tuple(column for column, _ in settled.values() if column)
    notes = [note for _, note in settled.values() if note]
    if not columns:
        raise HeliostatError(f"no column of {data.source} carries anything: {'; '.join(notes)}")
    unused = (place for place, name in enumerate(layout.numeric) if settled[name][0] is None)
    return TableFeatures(columns, tuple(unused)), notes


def settle_numbers(
    names: tuple[str, ...], statistics: list[list[dict[str, Any]]]
) -> tuple[Numbers, list[str]]:
    """What is predicted, from the `measure_numbers` of the labels of all training shards."""
    moments = [_merge(list(parts)) for parts in zip(*statistics, strict=True)]
    notes = [
        f"label {name} has only the value {moment.mean:g} in the training rows"
        for name, moment in zip(names, moments, strict=True)
        if moment.is_constant
    ]
    means, stds = (tuple(getattr(m, part) for m in moments) for part in ("mean", "std"))
    return Numbers(names, means, stds), notes


def _settle_series(
    layout: SeriesLayout, statistics: list[dict[str, Any]]
) -> tuple[SeriesFeatures, list[str]]:
    parts = zip(*(part["channels"] for part in statistics), strict=True)
    moments = [_merge(list(channel)) for channel in parts]
    notes = [
        f"channel {number} of the series has only the value {moment.mean:g} in the training rows"
        for number, moment in enumerate(moments)
        if moment.is_constant
    ]
    means, stds = (tuple(getattr(m, part) for m in moments) for part in ("mean", "std"))
    return SeriesFeatures(layout.length, layout.channels, means, stds), notes


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
    features = BlockFeatures(
        length, known.size, known.end, known.sha256, known.token_bytes, known.chat_template
    )
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


@dataclass(frozen=True)
class Moments:
    count: int
    mean: float
    std: float
    is_constant: bool


def _merge(parts: list[dict[str, Any]]) -> Moments:
    """Mean and deviation by Chan's rule for merging the moments of parts; a constant deviates 1."""
    count, mean, spread = 0, 0.0, 0.0
    for part in parts:
        if part["count"]:
            total = count + part["count"]
            step = part["mean"] - mean
            spread += part["spread"] + step * step * count * part["count"] / total
            mean += step * part["count"] / total
            count = total
    extremes = {bound for part in parts for bound in part["range"]}
    if len(extremes) == 1:  # the mean of equal numbers may be off by rounding
        return Moments(count, extremes.pop(), 1.0, True)
    return Moments(count, mean, math.sqrt(spread / max(count, 1)) or 1.0, False)


def _settle_number(
    name: str, parts: list[dict[str, Any]], data: DataSpec
) -> tuple[NumericColumn | None, str]:
    moments = _merge(parts)
    if not moments.count:
        return None, f"column {name} is dropped: it has no value in the training rows"
    has_missing = any(part["missing"] for part in parts)
    note = f"column {name} has only the value {moments.mean:g} in the training rows"
    column = NumericColumn(name, moments.mean, moments.std, has_missing)
    return column, note if moments.is_constant else ""


def _settle_ids(name: str, parts: list[list[str]], data: DataSpec) -> tuple[IdColumn | None, str]:
    values = set().union(*parts)
    _check_ids(name, len(values))
    if not values:
        return None, f"column {name} is dropped: it has no value in the training rows"
    return IdColumn(name, tuple(sort_names(values))), ""


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


SETTLERS: dict[str, Callable[..., tuple[Column | None, str]]] = {
    "numeric": _settle_number,
    "category": _settle_texts,
    "id": _settle_ids,
}
