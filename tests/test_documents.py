"""Objects that were cut, emptied or written by somebody else are told from those that are whole."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.storage import LocalStore, Missing
from heliostat.storage.documents import Damaged, read_document


@dataclass(frozen=True)
class Part:
    size: int


@dataclass(frozen=True)
class Whole:
    name: str
    share: float
    parts: tuple[Part, ...]


WHOLES = st.builds(
    Whole,
    st.text(st.characters(codec="utf-8")),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.builds(Part, st.integers(-(2**53), 2**53))).map(tuple),
)


@given(WHOLES, st.data())
def test_what_was_written_is_read_and_any_cut_of_it_is_named(
    tmp_path_factory: pytest.TempPathFactory, whole: Whole, draw: st.DataObject
) -> None:
    store = LocalStore(str(tmp_path_factory.mktemp("store")))
    data = json.dumps(asdict(whole)).encode()
    store.write("a/whole.json", data)
    assert read_document(store, "a/whole.json", Whole) == whole
    end = draw.draw(st.integers(0, len(data) - 1))
    store.write("a/whole.json", data[:end])
    with pytest.raises(Damaged, match=r"a/whole\.json is damaged"):
        read_document(store, "a/whole.json", Whole)


@pytest.mark.parametrize(
    "data", [b"null", b"[]", b"{}", b'{"name": "a", "share": 0.5, "parts": 3}', b"\xff\xfe"]
)
def test_other_json_is_named_too(tmp_path: Path, data: bytes) -> None:
    store = LocalStore(str(tmp_path))
    store.write("whole.json", data)
    with pytest.raises(Damaged, match=r"whole\.json is damaged"):
        read_document(store, "whole.json", Whole)


def test_nothing_there_is_not_damage(tmp_path: Path) -> None:
    with pytest.raises(Missing):
        read_document(LocalStore(str(tmp_path)), "whole.json", Whole)
