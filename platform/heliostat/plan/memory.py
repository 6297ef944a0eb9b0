"""Memory of a training worker by its parts, and the most rows that it can have in flight."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from heliostat.plan.figure import Figure

# Bytes of a number as it travels and is computed with.
WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
FLOAT = 4
ZERO = "ZeRO (Rajbhandari et al. 2020), section 5"
FSDP = "PyTorch FSDP (Zhao et al. 2023), section 4"


@dataclass(frozen=True)
class Line:
    """Bytes that grow with the rows in flight."""

    fixed: int
    per_row: int

    def at(self, rows: int) -> int:
        return self.fixed + self.per_row * rows


@dataclass(frozen=True)
class Footprint:
    """What a training step keeps, in bytes, measured on one worker that holds the whole network.

    `weights`, `gradients`, `optimizer` and the moving `average` are what they are called.
    `together` is the most that lives besides weights and optimizer at any moment, `working` without
    the gradients, `sharded` without the weights in low precision either, which FSDP gathers.
    `largest_block` are the weights of the largest of the repeated blocks, `outside_blocks` those of
    no block. `kernels` are the operations of a step that make something, each of which is launched.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    largest_block: int
    outside_blocks: int
    kernels: int
    together: tuple[Line, ...]
    working: tuple[Line, ...]
    sharded: tuple[Line, ...]


@dataclass(frozen=True)
class Layout:
    """How a step is shared: over `workers`, with a part of the rows at a time if `accumulates`.

    `overhead` is what a worker takes before there is any tensor.
    """

    strategy: str
    precision: str
    workers: int
    accumulates: bool
    overhead: Figure


def envelope(lines: Iterable[Line]) -> tuple[Line, ...]:
    """Those of `lines` that are the highest for some number of rows from 1 on, flattest first."""
    kept: list[Line] = []
    for line in sorted(lines, key=lambda line: (line.per_row, line.at(1))):
        while kept and kept[-1].at(1) <= line.at(1):
            kept.pop()
        while len(kept) > 1 and _meet(kept[-2], line) <= _meet(kept[-2], kept[-1]):
            kept.pop()
        kept.append(line)
    return tuple(kept)


def highest(lines: Sequence[Line], rows: int) -> int:
    return max(line.at(rows) for line in lines)


def estimate_memory(footprint: Footprint, layout: Layout, rows: int) -> tuple[Figure, ...]:
    """The parts of a worker's peak with `rows` in flight, in bytes.

    Alone, gradients are freed before a step and grow while activations shrink, so that the peak is
    less than the sum of both; `working` then says what comes on top of weights and optimizer.
    """
    return _PARTS[layout.strategy if layout.workers > 1 else "alone"](footprint, layout, rows)


def total(parts: Iterable[Figure]) -> int:
    return sum(round(part.value) for part in parts)


def most_rows(footprint: Footprint, layout: Layout, limit: int, most: int) -> int:
    """The most rows up to `most` whose peak is at most `limit` bytes; 0 if not even one is."""

    def fits(rows: int) -> bool:
        return total(estimate_memory(footprint, layout, rows)) <= limit

    if not fits(1):
        return 0
    low, high = 1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _alone(of: Footprint, layout: Layout, rows: int) -> tuple[Figure, ...]:
    if layout.accumulates:
        return _replicated(of, layout, rows)
    together = highest(of.together, rows)
    working = min(together, highest(of.working, rows))
    return (
        _weights(of.weights, ""),
        Figure(
            "gradients", together - working, "B",
            "what of them is alive at the peak: they come while activations go",
            "the step, run on tensors without values",
        ),
        *_kept(of, 1),
        _activations(working, rows),
        layout.overhead,
    )  # fmt: skip


def _replicated(of: Footprint, layout: Layout, rows: int) -> tuple[Figure, ...]:
    return (
        _weights(of.weights, ""),
        Figure("gradients", of.gradients, "B", "one each, kept from step to step", ZERO),
        *_kept(of, 1),
        _activations(highest(of.working, rows), rows),
        layout.overhead,
    )


def _sharded(of: Footprint, layout: Layout, rows: int) -> tuple[Figure, ...]:
    """Two blocks are gathered at once, the one that computes and the one after it.

    Gradients are whole on each worker while they are added up over micro batches.
    """
    share, width = f", of which a worker has 1/{layout.workers}", WIDTHS[layout.precision]
    numbers = (2 * of.largest_block + of.outside_blocks) // FLOAT
    gathered = numbers * width + max(of.largest_block, of.outside_blocks)
    gradients, kept = -(-of.gradients // layout.workers), f"one each{share}"
    if layout.accumulates:
        gradients, kept = of.gradients, "one each, whole until the last micro batch"
    return (
        _weights(-(-of.weights // layout.workers), share),
        Figure("gradients", gradients, "B", kept, ZERO),
        *_kept(of, layout.workers),
        Figure(
            "gathered", gathered, "B",
            "two blocks and what is in none, as they compute, and the gradients of a block",
            FSDP,
        ),
        _activations(highest(of.sharded, rows), rows),
        layout.overhead,
    )  # fmt: skip


_PARTS = {"alone": _alone, "ddp": _replicated, "fsdp": _sharded}


def _weights(size: int, share: str) -> Figure:
    return Figure("weights", size, "B", f"4 bytes each, float32{share}", "counted")


def _kept(of: Footprint, workers: int) -> Iterator[Figure]:
    """What lasts from step to step besides weights, where there is any."""
    share = f", of which a worker has 1/{workers}" if workers > 1 else ""
    optimizer, average = (-(-size // workers) for size in (of.optimizer, of.average))
    yield Figure("optimizer", optimizer, "B", f"its moments in float32{share}", "counted")
    if average:
        yield Figure("average", average, "B", f"of the weights, float32{share}", "counted")


def _activations(size: int, rows: int) -> Figure:
    reason = f"the most alive at once with {rows:,} rows in flight"
    return Figure("activations", size, "B", reason, "the step, run on tensors without values")


def _meet(flat: Line, steep: Line) -> float:
    """The rows from which on `steep` is the higher one."""
    if steep.per_row == flat.per_row:
        return float("-inf")
    return (flat.fixed - steep.fixed) / (steep.per_row - flat.per_row)
