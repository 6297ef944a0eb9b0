"""Laws of a worker's memory: lines over rows, shares of workers, and the most rows that fit."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from heliostat.plan.figure import Figure
from heliostat.plan.memory import (
    Footprint,
    Layout,
    Line,
    envelope,
    estimate_memory,
    highest,
    most_rows,
    total,
)

LINES = st.lists(
    st.builds(Line, st.integers(0, 10**9), st.integers(0, 10**6)), min_size=1, max_size=30
)
SIZES = st.integers(0, 10**9)
NOTHING = Figure("framework", 0, "B", "", "")
FOOTPRINTS = st.builds(
    Footprint,
    SIZES,
    SIZES,
    SIZES,
    SIZES,
    SIZES,
    SIZES,
    SIZES,
    *(LINES.map(envelope) for _ in range(3)),
)
LAYOUTS = st.builds(
    Layout,
    st.sampled_from(["ddp", "fsdp"]),
    st.sampled_from(["fp32", "bf16"]),
    st.integers(1, 64),
    st.booleans(),
    SIZES.map(lambda size: replace(NOTHING, value=size)),
)


@given(LINES, st.integers(1, 10**7))
def test_the_envelope_is_as_high_as_all_lines(lines: list[Line], rows: int) -> None:
    assert highest(envelope(lines), rows) == highest(lines, rows)


@given(LINES)
def test_the_envelope_has_no_line_that_is_never_the_highest(lines: list[Line]) -> None:
    kept = envelope(lines)
    slopes = [line.per_row for line in kept]
    assert slopes == sorted(set(slopes))
    starts = [line.at(1) for line in kept]
    assert starts == sorted(starts, reverse=True)


@given(FOOTPRINTS, LAYOUTS, st.integers(0, 10**11), st.integers(1, 5000))
def test_the_most_rows_fit_and_one_more_does_not(
    footprint: Footprint, layout: Layout, limit: int, most: int
) -> None:
    rows = most_rows(footprint, layout, limit, most)
    assert 0 <= rows <= most
    if rows:
        assert total(estimate_memory(footprint, layout, rows)) <= limit
    if rows < most:
        assert total(estimate_memory(footprint, layout, rows + 1)) > limit


@given(FOOTPRINTS, st.integers(2, 500), st.integers(1, 100))
def test_fsdp_shares_what_ddp_keeps_on_each(footprint: Footprint, workers: int, rows: int) -> None:
    def parts(strategy: str, number: int) -> dict[str, float]:
        layout = Layout(strategy, "fp32", number, accumulates=False, overhead=NOTHING)
        return {part.name: part.value for part in estimate_memory(footprint, layout, rows)}

    whole, shared = parts("ddp", workers), parts("fsdp", workers)
    for name in ("weights", "gradients", "optimizer", "average"):
        assert shared.get(name, 0) == -(-whole.get(name, 0) // workers)
    assert whole == parts("ddp", workers + 1)
