"""CSV as records: quoted cells may hold line ends, but a stray quote takes no other lines."""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

MAX_FIELD_CHARACTERS = 16 * 1024 * 1024
ROWS_SHARE = 0.9
UNIT_SEPARATOR = "\x1f"


@dataclass(frozen=True)
class Record:
    """The cells of a row, none if the line is blank or there is a `problem`."""

    cells: list[str]
    problem: str | None = None


def read_records(text: Iterable[str], delimiter: str, width: int = 0) -> Iterator[Record]:
    """Of `width` cells, else as many as the first has; of one column a blank line is an empty cell.

    A delimiter of several characters is of files that know no quotes.

    A quote that nothing closes takes in all lines below it, and a second stray one hides that. Both
    are told from a text of several lines: such a record does not end with its quote, or its lines
    are written like rows. Its first line is a bad row then, and each other line a record again.
    """
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    if len(delimiter) > 1:  # csv splits at one character alone
        split = (line.replace(delimiter, UNIT_SEPARATOR) for line in text)
        yield from read_records(split, UNIT_SEPARATOR, width)
        return
    reader = _Reader(iter(text), delimiter, width)
    while record := reader.read():
        yield record
        if record.problem and len(reader.taken) > 1:
            *inside, _ = reader.taken[1:]
            reader.give_back()
            for line in inside:
                yield _Reader(iter([line]), delimiter, reader.width).read() or Record([])


class _Reader:
    """Records one by one; `taken` are the lines of the last one, and `width` the cells of all."""

    def __init__(self, text: Iterator[str], delimiter: str, width: int = 0) -> None:
        self._text, self._delimiter, self.width = text, delimiter, width
        quoting = csv.QUOTE_NONE if delimiter == UNIT_SEPARATOR else csv.QUOTE_MINIMAL
        self._style: dict[str, Any] = {
            "delimiter": delimiter,
            "quoting": quoting,
            "skipinitialspace": True,
        }
        self._records = csv.reader(self, **self._style)
        self._number, self._given_back = 0, list[str]()
        self._has_ended = False
        self.taken = list[str]()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """A line: csv asks for another one while a record is not whole."""
        line = self._given_back.pop() if self._given_back else next(self._text, None)
        if line is None:
            self._has_ended = True
            raise StopIteration
        self._number += 1
        self.taken.append(line)
        return line

    def give_back(self) -> None:
        """The last line will be read again."""
        self._number -= 1
        self._given_back.append(self.taken.pop())

    def read(self) -> Record | None:
        self.taken, self._has_ended = [], False
        place = f"line {self._number + 1:,}"
        try:
            cells = next(self._records, None)
        except csv.Error as error:
            return Record([], f"{error}: in {place}")
        if cells is None:
            return None
        self.width = self.width or len(cells)
        if fault := self._find_stray_quote(cells):
            return Record([], f"{fault}: in {place}, double it or take quotes out")
        return Record(cells or [""] * (self.width == 1))

    def _find_stray_quote(self, cells: list[str]) -> str | None:
        if self._has_ended:
            return "a quote that is not closed"
        if len(self.taken) > 1 and (
            (self._delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in cells))
            or not self._closes_cleanly()
            or self._are_rows()
        ):
            return "a quote that takes in other lines"
        return None

    def _closes_cleanly(self) -> bool:
        """Whether a delimiter or the line's end follows each quote that closes."""
        try:
            next(csv.reader(self.taken, **self._style, strict=True))
        except csv.Error:
            return False
        return True

    def _are_rows(self) -> bool:
        """Whether nearly each line has the delimiters of a row, with no blanks behind them.

        In a text a blank follows a comma; in a table it does if it does before the quote too.
        """
        blank = f"{self._delimiter} "
        is_spaced = blank in self.taken[0].partition('"')[0]
        lines = [line for line in self.taken if line.strip()]
        alike = sum(
            line.count(self._delimiter) == self.width - 1 and (is_spaced or blank not in line)
            for line in lines
        )
        return self.width > 1 and alike >= ROWS_SHARE * len(lines)
