"""Text as the commands print it."""

from collections.abc import Sequence

MIB, GIB = 2**20, 2**30


def render_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    table = [tuple(header), *(tuple(str(cell) for cell in row) for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def print_now(line: str) -> None:
    print(line, flush=True)
