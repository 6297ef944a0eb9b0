"""What the texts of a CSV column are: how many are numbers, and which may be meant otherwise."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from heliostat.data.cells import MISSING_TEXTS

NUMERIC_SHARE = 0.95
WITH_COMMA = r"^[+-]?\d+(,\d+)+$"
WORDS = pa.array(sorted(MISSING_TEXTS - {""}))
MAX_WORDS = 3


def drop_words(texts: pa.Array) -> pa.Array:
    """Null for the words for "missing", which CSV needs; Parquet has nulls of its own."""
    is_word = pc.is_in(pc.utf8_trim_whitespace(texts), value_set=WORDS)
    return pc.if_else(is_word, pa.scalar(None, texts.type), texts)


@dataclass
class Tally:
    """The `present` values and the `numbers` among them; numbers but for a comma, of which `comma`
    is one; and the `words` that are read as missing."""

    present: int = 0
    numbers: int = 0
    commas: int = 0
    comma: str = ""
    words: dict[str, int] = field(default_factory=dict)

    def add(self, column: pa.Array, numbers: pa.Array, wrong: pa.Array) -> None:
        """Count texts, the numbers in them, and where one is neither a number nor missing."""
        texts = pc.utf8_trim_whitespace(column)
        found = len(texts) - numbers.null_count
        self.present += found + pc.sum(wrong, min_count=0).as_py()
        self.numbers += found
        others = texts.filter(wrong)
        commas = others.filter(pc.match_substring_regex(others, WITH_COMMA))
        self.commas += len(commas)
        self.comma = self.comma or next((text.as_py() for text in commas), "")
        self.add_words(Counter(texts.filter(pc.is_in(texts, value_set=WORDS)).to_pylist()))

    def add_words(self, words: dict[str, int]) -> None:
        for word, count in words.items():
            self.words[word] = self.words.get(word, 0) + count

    @property
    def kind(self) -> str:
        is_numeric = self.present and self.numbers >= NUMERIC_SHARE * self.present
        return "numeric" if is_numeric else "category"

    @property
    def has_commas(self) -> bool:
        """Whether it would be a column of numbers, were they written with points."""
        both = self.numbers + self.commas
        return self.commas > 0 and both >= NUMERIC_SHARE * self.present

    def tell_commas(self, name: str) -> str:
        return (
            f"the column {name} has numbers with commas, such as {self.comma!r}, which are read as "
            "texts: write 0.5 for 0,5 and 1000 for 1,000"
        )

    def tell_words(self, name: str) -> str:
        most = Counter(self.words).most_common(MAX_WORDS)
        told = ", ".join(f"{word!r} ({count:,} times)" for word, count in most)
        told += ", ..." * (len(self.words) > MAX_WORDS)
        return (
            f"in the column {name} {told} is read as missing: if that is a value, write it in "
            "another way"
        )


def add_up(found: Iterable[dict[str, Any]]) -> Tally:
    """The tally of a column in all files, from that of each as a document."""
    total = Tally()
    for part in found:
        total.present += part["present"]
        total.numbers += part["numbers"]
        total.commas += part["commas"]
        total.comma = total.comma or part["comma"]
        total.add_words(part["words"])
    return total
