"""CSV and Parquet: columns by their content, every row once, what cannot be used by name."""

import contextlib
import datetime
import gzip
import io
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets import unpack
from heliostat.data.features import CategoryColumn, IdColumn, TableFeatures
from heliostat.data.instances import parse_instances
from heliostat.data.pipeline import FORMS
from heliostat.data.raw import TableLayout, choose_kind, find_source
from heliostat.errors import HeliostatError
from heliostat.spec import DataSpec, SplitSpec, load

Read = Callable[..., Any]
CSV = b"""\xef\xbb\xbfage, town ,hours,who,income\r
39,Ulm,8.5,"Ann ""A"" Bee", >50K\r
?,"K\xc3\xb6ln,\nRhein",NA,Bob,<=50K\r
\r
50,,1e1,Cid,<=50K\r
"""


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, **options)
    return file.getvalue()


def bad_rows(rows: pa.Table) -> dict[str, str]:
    problems = zip(rows["id"].to_pylist(), rows["problem"].to_pylist(), strict=True)
    return {row: problem for row, problem in problems if problem}


class Hostile:
    """Unpickled, it makes the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "extension", ["arrow.py_extension_type", "ray.data.arrow_pickled_object", "unheard.of"]
)
@pytest.mark.parametrize("place", ["of the type", "of the values"])
def test_no_code_in_a_parquet_file_runs(
    read: Read, tmp_path: Path, extension: str, place: str
) -> None:
    import ray.data  # registers types of its own, values of one of which are pickled

    assert ray.data
    canary, code = tmp_path / "canary", pickle.dumps(Hostile(tmp_path / "canary"))
    metadata = {
        "ARROW:extension:name": extension,
        "ARROW:extension:metadata": code if place == "of the type" else b"",
    }
    field = pa.field("a", pa.large_binary(), metadata=metadata)
    schema = pa.schema([field, pa.field("n", pa.int64()), pa.field("y", pa.string())])
    hostile = pa.table([[code, code], [1, 2], ["p", "q"]], schema=schema)
    file = io.BytesIO()
    pq.write_table(hostile, file)
    with contextlib.suppress(HeliostatError):
        read({"t.parquet": file.getvalue()}, label="y")
    assert not canary.exists()
    pickle.loads(code)  # noqa: S301  our own, to see that it would have worked
    assert canary.exists()


@pytest.mark.parametrize(
    "rows",
    [
        "1::10::5::97\n1::20::3::98\n2::10::4::99\n",
        "1\t10\t5\t97\n1\t20\t3\t98\n2\t10\t4\t99\n",
        '"1","10",5,97\n1,20,3,98\n2,10,4,99\n',
    ],
    ids=["two colons", "tabs", "commas"],
)
def test_columns_of_files_without_names_are_named_by_the_spec(read: Read, rows: str) -> None:
    wanted = {"format": "csv", "label": "rating", "task": "regression"}
    columns = {"user": "id", "item": "id", "time": "ignore"}
    with pytest.raises(HeliostatError, match=r"begins with 1: .* or data\.header in its place"):
        read({"u.data": rows.encode()}, **wanted)
    header = ("user", "item", "rating", "time")
    _, table = read({"u.data": rows.encode()}, **wanted, columns=columns, header=header)
    assert table["label"].to_pylist() == [5, 3, 4]
    assert table["x.user"].to_pylist() == ["1", "1", "2"]
    assert table["x.item"].to_pylist() == ["10", "20", "10"]
    named = "user::item::rating::time\n".replace("::", rows[1] if rows[0] == "1" else ",")
    if "::" in rows:
        named = "user::item::rating::time\n"
    _, again = read({"u.data": (named + rows).encode()}, **wanted, columns=columns)
    assert again.drop(["id"]) == table.drop(["id"])


def test_a_quote_at_the_edge_of_a_field_between_two_colons_is_text(read: Read) -> None:
    rows = b'title::kind\n"Great Cats::a\nDogs", a play::b\n'
    _, table = read({"t.csv": rows}, label="kind", columns={"title": "category"})
    assert table["x.title"].to_pylist() == ['"Great Cats', 'Dogs", a play']


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_csv_file_as_people_have_them(read: Read, pack: Callable[[bytes], bytes]) -> None:
    survey, rows = read({"people.csv": pack(CSV)}, label="income")
    assert survey.layout.kinds == {
        "age": "numeric",
        "town": "category",
        "hours": "numeric",
        "who": "category",
    }
    assert survey.labels == ("<=50K", ">50K")
    rows = unpack(rows, "age", "hours")
    assert rows["id"].to_pylist() == ["people.csv#0", "people.csv#1", "people.csv#2"]
    assert rows["x.age"].to_pylist() == [39, None, 50]
    assert rows["x.town"].to_pylist() == ["Ulm", "Köln,\nRhein", None]
    assert rows["x.hours"].to_pylist() == [8.5, None, 10]
    assert rows["x.who"][0].as_py() == 'Ann "A" Bee'
    assert not bad_rows(rows)


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_other_delimiters_are_found_in_the_header(read: Read, delimiter: str) -> None:
    text = "a,b,y\n1,2,p\n3,4,q\n".replace(",", delimiter)
    survey, rows = read({"t.csv": text.encode()}, label="y")
    assert survey.layout.kinds == {"a": "numeric", "b": "numeric"}
    assert unpack(rows, "a", "b")["x.b"].to_pylist() == [2, 4]


def test_rows_that_cannot_be_used_are_named(read: Read) -> None:
    good = "".join(f"{row},{row % 2}\n" for row in range(100))
    text = f"n,y\n{good}1,2,3\nabc,1\ninf,1\n7,\n8".encode() + b"\n\xff,1\n"
    _, rows = read({"t.csv": text}, label="y")
    advice = "mend it or set data.columns.n=category"
    assert rows.num_rows == 106
    assert bad_rows(rows) == {
        "t.csv#100": "3 fields instead of 2",
        "t.csv#101": f"column n is not a number of at most 1e+100: 'abc', {advice}",
        "t.csv#102": f"column n is not a number of at most 1e+100: 'inf', {advice}",
        "t.csv#103": "the label is missing",
        "t.csv#104": "1 fields instead of 2",
        "t.csv#105": "not UTF-8 text",
    }


def test_a_column_is_numeric_if_nearly_all_of_it_is(read: Read) -> None:
    lines = [f"{'x' if row < 5 else row},{'x' if row < 6 else row},{row % 2}" for row in range(100)]
    data = {"t.csv": ("\n".join(["a,b,y", *lines])).encode()}
    assert read(data, label="y")[0].layout.kinds == {"a": "numeric", "b": "category"}
    survey, rows = read(data, label="y", columns={"a": "category", "b": "numeric"})
    assert survey.layout.kinds == {"a": "category", "b": "numeric"}
    assert len(bad_rows(rows)) == 6
    assert read(data, label="y", columns={"b": "ignore"})[0].layout.kinds == {"a": "numeric"}


def test_a_word_that_is_read_as_missing_is_told_where_it_may_be_a_value(read: Read) -> None:
    words = ["NA", "NULL", "null", "None", "N/A", "?", "nan", "NaN", ""]
    cells = [(words[row % 9], "None" if row % 2 else "p") for row in range(90)]
    lines = [f"{row},{word},{label},{word}" for row, (word, label) in enumerate(cells)]
    lines += [f"{row},DE,q,{row}" for row in range(90, 900)]
    text = "\n".join(["n,country,y,m", *lines]).encode()
    survey, rows = read({"a.csv": text, "b.csv": text}, label="y")
    assert survey.layout.kinds["m"] == "numeric"
    assert rows["x.country"][1].as_py() is None
    told = [note for note in survey.notes if "missing" in note]
    assert told[0].startswith("in the column y 'None' (90 times) is read as missing")
    assert "'NA' (20 times)" in told[1]
    assert len(told) == 2
    with pytest.raises(HeliostatError, match=r"only the class 'p' \(in the column y 'None' \(4"):
        read({"t.csv": b"n,y\n" + b"1,p\n2,None\n" * 4}, label="y")


def test_numbers_with_commas_are_told_where_they_are_read_as_texts(read: Read) -> None:
    lines = [f"{row},5;{row},000;{row}.5;1,{row},y;{'pq'[row % 2]}" for row in range(40)]
    text = "\n".join(["half;thousand;point;text;y", *lines]).encode()
    told = [note for note in read({"t.csv": text}, label="y")[0].notes if "commas" in note]
    assert len(told) == 2
    assert "the column half has numbers with commas, such as '0,5'" in told[0]
    assert "the column thousand has numbers with commas, such as '0,000'" in told[1]
    columns = {"half": "category", "thousand": "ignore"}
    notes = read({"t.csv": text}, label="y", columns=columns)[0].notes
    assert not any("commas" in note for note in notes)
    _, rows = read({"t.csv": text}, label="half", task="regression")
    assert bad_rows(rows)["t.csv#0"] == (
        "label half is not a number of at most 1e+100: '0,5', mend it or set "
        "data.task=classification if these are classes"
    )


@pytest.mark.parametrize("name", ["n", "a b", "a.b", "a=b", 'say "a.b", {c}: d'])
def test_the_override_that_a_message_recommends_is_one(tmp_path: Path, name: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("name: tiny\ndata: {source: raw}\nmodel: {kind: mlp}\n")
    assert load(path, (choose_kind(name, "ignore"),)).data.columns == {name: "ignore"}


def test_a_column_without_a_name_is_left_out(read: Read) -> None:
    survey, rows = read({"t.csv": b",a,y\n0,5,p\n1,6,q\n"}, label="y")
    assert survey.layout.kinds == {"a": "numeric"}
    assert unpack(rows, "a")["x.a"].to_pylist() == [5, 6]


def test_a_blank_line_is_a_row_where_there_is_one_column(
    source: Callable[[dict[str, bytes]], Any],
) -> None:
    found = find_source(DataSpec(source=str(source({"t.csv": b"n\n1\n\n3\r\n\r\n"}))))
    form, layout = FORMS[found.form], TableLayout((), {"n": "numeric"})
    [unit] = form.split(found)
    rows = unpack(pa.concat_tables(form.read(found.store, unit, layout)), "n")
    assert rows["id"].to_pylist() == [f"t.csv#{row}" for row in range(4)]
    assert rows["x.n"].to_pylist() == [1, None, 3, None]
    assert not bad_rows(rows)


def test_whole_labels_are_written_without_a_point(read: Read) -> None:
    survey, _ = read({"t.csv": b"a,y\n1,1.0\n2,10\n3,2\n4,2.00\n5,1\n"}, label="y")
    assert survey.labels == ("1", "2", "10")


def test_the_user_is_the_first_id_of_the_section_whatever_the_order_of_the_file(read: Read) -> None:
    data = {"t.csv": b"book,year,user,rating\n1,1999,7,3\n2,2001,8,4\n"}
    kinds = read(data, label="rating", columns={"user": "id", "book": "id"})[0].layout.kinds
    assert [name for name, kind in kinds.items() if kind == "id"] == ["user", "book"]
    kinds = read(data, label="rating", columns={"book": "id", "user": "id"})[0].layout.kinds
    assert [name for name, kind in kinds.items() if kind == "id"] == ["book", "user"]


@pytest.mark.parametrize(
    "section", [{"label": "y"}, {"label": "t"}, {"format": "text", "text": {"column": "t"}}]
)
def test_a_text_in_parquet_that_is_not_utf8_is_a_sentence(read: Read, section: Any) -> None:
    latin = pa.array([b"a", "é".encode("latin-1")], pa.binary()).view(pa.string())
    data = {"t.parquet": parquet({"t": latin, "y": ["p", "q"]})}
    with pytest.raises(HeliostatError, match=r"t\.parquet is not a readable Parquet file: .*UTF8"):
        read(data, **section)


def rows_with(cells: dict[int, str], count: int, delimiter: str = ",") -> list[str]:
    """Rows n,y,comment, with `cells` as the comments of some."""
    return [delimiter.join((str(row), "pq"[row % 2], cells.get(row, "ok"))) for row in range(count)]


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
@pytest.mark.parametrize(
    ("cells", "bad"),
    [
        ({100: '"hello'}, {100: "not closed: in line 102"}),
        ({199: '"hello'}, {199: "not closed: in line 201"}),
        (
            {100: '"hello', 150: '"hello'},
            {100: "takes in other lines: in line 102", 150: "not closed: in line 152"},
        ),
        ({100: '"hello', 150: '5"'}, {100: "takes in other lines: in line 102"}),
        ({100: '"hello', 150: '"yes"'}, {100: "takes in other lines: in line 102"}),
        ({100: '"hello', 120: "", 130: '""', 150: '"a\nb"'}, {100: "takes in other lines"}),
        ({100: '"hello', 130: "one,two;three\tfour", 150: '5"'}, {100: "takes", 130: "fields"}),
    ],
)
def test_a_stray_quote_takes_no_other_row(
    read: Read, delimiter: str, cells: dict[int, str], bad: dict[int, str]
) -> None:
    lines = [delimiter.join(("n", "y", "comment")), *rows_with(cells, 200, delimiter)]
    _, rows = read({"t.csv": "\n".join(lines).encode()}, label="y")
    found = bad_rows(rows)
    assert rows.num_rows == 200
    assert list(found) == [f"t.csv#{row}" for row in bad]
    for problem, told in zip(found.values(), bad.values(), strict=True):
        assert told in problem
    good = [row for row in range(200) if row not in bad]
    numbers = unpack(rows, "n")["x.n"].to_pylist()
    assert [numbers[row] for row in good] == good


@pytest.mark.parametrize("delimiter", [",", ";"])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (1, 2, 0), (1, 0), (0, 1)])
@pytest.mark.parametrize(
    "text",
    [
        "Great.\nOK",
        "Great.\r\n\r\nReally, it is.",
        "Hello, you\nGood, bye",
        'He said ""no""\nand, well, left',
        "a\n",
        "a\nb\nc, d",
        "; ".join(["several"] * 3) + "\nlines; of; it",
    ],
)
def test_a_quoted_text_may_have_several_lines(
    read: Read, delimiter: str, order: tuple[int, ...], text: str
) -> None:
    names = ("text", "y", "n")
    lines = [delimiter.join(names[place] for place in order)]
    for row in range(20):
        cells = (f'"{text}{row}"', "pq"[row % 2], str(row))
        lines.append(delimiter.join(cells[place] for place in order))
    _, rows = read({"t.csv": "\n".join(lines).encode()}, label="y")
    assert not bad_rows(rows)
    told = text.replace('""', '"')
    assert rows["x.text"].to_pylist() == [f"{told}{row}" for row in range(20)]


def test_the_names_of_columns_have_no_open_quote(read: Read) -> None:
    with pytest.raises(HeliostatError, match=r"the names of the columns of .*t\.csv: .* in line 1"):
        read({"t.csv": b'n,"y\n1,p\n2,q\n'}, label="y")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("n,t,y\n1,é,p\n2,é,q\n".encode("latin-1"), r"2 of 2 rows .* t\.csv#0: not UTF-8 text"),
        (b"n,y\n1,p,\n2,q,\n", r"2 of 2 rows .* t\.csv#0: 3 fields instead of 2"),
        (b'n\tt\ty\n1\t"a\tp\n2\t"b\tq\n', r"2 of 2 rows .* t\.csv#0: a quote that takes"),
        (b"n,y\n1,p,\n2,p\n", r"only the class 'p' \(1 of 2 rows .* t\.csv#0: 3 fields"),
    ],
)
@pytest.mark.parametrize("form", ["csv", "text"])
def test_labels_that_no_usable_row_has_are_no_news_but_its_problem_is(
    read: Read, text: bytes, sentence: str, form: str
) -> None:
    with pytest.raises(HeliostatError, match=sentence):
        read({"t.csv": text}, label="y", format=form, text={"column": "n"})


def test_a_stray_quote_between_tabs_hides_no_row(read: Read) -> None:
    lines = ["id\ttitle\ty", "1\tplain\ta", '2\t"Weird\tb', "3\tplain\ta", '4\t"x\tb']
    lines += ['5\t"q"\ta', "6\tplain\tb"]
    _, rows = read({"t.tsv": "\n".join(lines).encode()}, label="y")
    assert list(bad_rows(rows)) == ["t.tsv#1", "t.tsv#3"]


def test_parquet_columns_by_their_types(read: Read) -> None:
    noon = datetime.datetime(1970, 1, 2, tzinfo=datetime.UTC)
    columns = {
        "i": pa.array([1, None, 3], pa.int32()),
        "f": [0.5, float("nan"), float("inf")],
        "d": pa.array([1, 2, 3], pa.decimal128(10, 2)),
        "b": [True, None, False],
        "t": [noon, None, noon],
        "day": [noon.date(), None, noon.date()],
        "s": [" Ulm", "?", "Köln"],
        "c": pa.array(["x", "y", "x"]).dictionary_encode(),
        "y": [1.0, 2.0, 1.0],
        "nested": [[1], [2], [3]],
    }
    files = {"a.parquet": parquet(columns), "b.pq": parquet(columns, row_group_size=1)}
    survey, rows = read(files, label="y", columns={"nested": "ignore"})
    assert survey.labels == ("1", "2")
    assert rows["id"].to_pylist()[2:4] == ["a.parquet#2", "b.pq#0"]
    first = unpack(rows, "i", "f", "d", "t", "day").slice(0, 2).to_pylist()
    assert [row["x.i"] for row in first] == [1, None]
    assert [row["x.f"] for row in first] == [0.5, None]
    assert [row["x.d"] for row in first] == [1, 2]
    assert [row["x.b"] for row in first] == ["true", None]
    assert [row["x.t"] for row in first] == [86400, None]
    assert [row["x.day"] for row in first] == [86400, None]
    assert [row["x.s"] for row in first] == ["Ulm", "?"]
    assert [row["x.c"] for row in first] == ["x", "y"]
    assert bad_rows(rows) == dict.fromkeys(
        ["a.parquet#2", "b.pq#2"],
        "column f is not a number of at most 1e+100: 'inf', mend it or set data.columns.f=category",
    )


def test_a_word_in_parquet_is_a_value_and_in_csv_it_is_missing(read: Read) -> None:
    words = ["NA", "None", " ? ", "", None, "DE"] * 2
    numbers = ["1", "NA", "2", None, "", "3"] * 2
    table: dict[str, list[Any]] = {"c": words, "i": words, "n": numbers, "y": ["None", "Some"] * 6}
    kinds = {"c": "category", "i": "id", "n": "numeric"}
    survey, rows = read({"t.parquet": parquet(table)}, label="y", columns=kinds)
    assert survey.labels == ("None", "Some")
    values = ["NA", "None", "?", None, None, "DE"] * 2
    assert rows["x.c"].to_pylist() == rows["x.i"].to_pylist() == values
    assert unpack(rows, "n")["x.n"].to_pylist() == [1, None, 2, None, None, 3] * 2
    assert not bad_rows(rows)

    lines = zip(*(map(str, column) for column in table.values()), strict=True)
    text = "\n".join([",".join(table), *map(",".join, lines)])
    _, rows = read({"t.csv": text.replace("Some", "p", 2).encode()}, label="y", columns=kinds)
    assert rows["x.c"].to_pylist() == rows["x.i"].to_pylist() == [*[None] * 5, "DE"] * 2
    assert len(bad_rows(rows)) == 6


@pytest.mark.parametrize("word", ["NA", "DE", " NA "])
def test_a_word_that_training_took_for_a_value_is_one_in_a_request_and_a_file(
    source: Callable[[dict[str, bytes]], Any], word: str
) -> None:
    columns = (CategoryColumn("c", ("DE", "NA")), IdColumn("i", ("DE", "NA")))
    features = TableFeatures(columns)
    asked = parse_instances(features, [{"c": word, "i": word}])
    assert asked["x.c"][0] == asked["x.i"][0] == word.strip()
    found = find_source(DataSpec(source=str(source({"t.csv": f"c,i\n{word},{word}\n".encode()}))))
    layout = TableLayout((), {"c": "category", "i": "id"})
    [rows] = FORMS["csv"].read(found.store, {"key": "t.csv"}, layout)
    assert rows["x.c"].to_pylist() == rows["x.i"].to_pylist() == [word.strip()]


def test_parquet_files_agree_on_what_a_column_is_not_on_how_wide_it_is(read: Read) -> None:
    numbers: list[pa.Array] = [
        pa.array([1, 2], pa.int32()),
        pa.array([3, 4], pa.int64()),
        pa.array([5.5, None]),
        pa.array([6, 7], pa.decimal128(10, 2)),
        pa.nulls(2),
    ]
    texts = [pa.nulls(2), pa.array(["a", "b"]), pa.array(["c", "d"], pa.large_string())]
    texts += [pa.array(["e", "f"]).dictionary_encode(), pa.nulls(2)]
    files = {
        f"{place}.parquet": parquet({"n": n, "id": n, "c": n, "t": t, "y": ["p", "q"]})
        for place, (n, t) in enumerate(zip(numbers, texts, strict=True))
    }
    for turned in (files, dict(zip(files, reversed(files.values()), strict=True))):
        survey, rows = read(turned, label="y", columns={"c": "category", "id": "id"})
        assert survey.layout.kinds == {
            "n": "numeric",
            "id": "id",
            "c": "category",
            "t": "category",
        }
        found = unpack(rows, "n").to_pylist()
        if turned is not files:
            found = [row for first in (8, 6, 4, 2, 0) for row in found[first : first + 2]]
        written = ["1", "2", "3", "4", "5.5", None, "6", "7", None, None]
        assert [row["x.n"] for row in found] == [text and float(text) for text in written]
        assert [row["x.id"] for row in found] == [row["x.c"] for row in found] == written
        assert [row["x.t"] for row in found] == [None, None, *"abcdef", None, None]
        assert not bad_rows(rows)


def test_a_type_that_only_other_files_contradict_is_refused(read: Read) -> None:
    columns = [pa.nulls(1), pa.array([1]), pa.array(["a"])]
    files = {f"{n}.pq": parquet({"c": column, "y": ["p"]}) for n, column in enumerate(columns)}
    with pytest.raises(HeliostatError, match=r"1.pq has c \(int64\) where 2.pq has c \(string\)"):
        read(files, label="y")


def test_the_index_of_pandas_is_no_column_unless_it_is_asked_for(read: Read) -> None:
    table = {"n": [1, 2], "y": ["p", "q"]}
    files = {
        "a.parquet": parquet(table | {"__index_level_0__": [7, 8]}),
        "b.parquet": parquet(table),
    }
    survey, _ = read(files, label="y")
    assert survey.layout.kinds == {"n": "numeric"}
    assert any("__index_level_0__" in note and "ignored" in note for note in survey.notes)
    columns = {"__index_level_0__": "numeric"}
    survey, _ = read({"a.parquet": files["a.parquet"]}, label="y", columns=columns)
    assert list(survey.layout.kinds) == ["n", "__index_level_0__"]
    assert not any("ignored" in note for note in survey.notes)


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_label_in_the_name_of_a_folder_is_said_to_be_there(read: Read, form: str) -> None:
    data = b"n,m\n1,2\n" if form == "csv" else parquet({"n": [1], "m": [2]})
    with pytest.raises(HeliostatError, match=r"one of n, m.* y=a is .*folder.*write y into"):
        read({f"y=a/p.{form}": data, f"y=b/p.{form}": data}, label="y")


def test_numbers_as_categories_are_written_as_in_a_request(read: Read) -> None:
    files = {"a.parquet": parquet({"i": [1, 2], "f": [1.0, 2.5], "y": ["p", "q"]})}
    _, rows = read(files, label="y", columns={"i": "category", "f": "category"})
    assert rows["x.i"].to_pylist() == ["1", "2"]
    assert rows["x.f"].to_pylist() == ["1", "2.5"]


def test_tables_that_cannot_be_a_data_set_are_refused(read: Read) -> None:
    table = parquet({"a": [1, 2], "y": ["p", "q"]})
    csv = b"a,y\n1,p\n2,q\n"
    cases: list[tuple[str, dict[str, bytes], dict[str, Any]]] = [
        ("data.label is None: .* one of a, y", {"t.csv": csv}, {"label": None}),
        ("data.label is 'z': .* one of a, y", {"t.parquet": table}, {"label": "z"}),
        (r"t.csv has a \(text\) where u.csv has b", {"t.csv": csv, "u.csv": b"b,y\n1,p\n"}, {}),
        (
            r"a.pq has a \(int64\) where b.pq has a \(string\)",
            {"a.pq": table, "b.pq": parquet({"a": ["1"], "y": ["p"]})},
            {},
        ),
        ("is empty", {"t.csv": b""}, {}),
        ("is empty", {"t.csv": b"\n\n"}, {}),
        ("only the class 'p'", {"t.csv": b"a,y\n1,p\n2,p\n"}, {}),
        ("have names of columns but no row", {"t.csv": b"a,y\n"}, {}),
        ("but no row", {"t.csv": b"a,y\n", "u.csv": b"a,y\n"}, {"task": "regression"}),
        ("but no row", {"t.pq": parquet({"a": [], "y": pa.nulls(0)})}, {"task": "regression"}),
        ("the column y of .* has no labels", {"t.csv": b"a,y\n1,\n2,\n"}, {}),
        ("its first line must name the columns", {"t.csv": b"1,2\n3,4\n"}, {}),
        ("names the column a twice", {"t.csv": b"a,a,y\n1,2,p\n"}, {}),
        ("is not UTF-8 text", {"t.csv": "a,y\n1,p\n".encode("utf-16")}, {}),
        ("is not a whole gzip file", {"t.csv.gz": gzip.compress(csv)[:-5]}, {}),
        ("no column beside y", {"t.csv": b"y\np\nq\n"}, {}),
        ("data.columns names z", {"t.csv": csv}, {"columns": {"z": "numeric"}}),
        ("is not a readable Parquet file", {"t.parquet": b""}, {}),
        ("is not a readable Parquet file", {"t.parquet": b"PAR1" + bytes(90)}, {}),
        ("is not a readable Parquet file", {"t.parquet": table[:-30]}, {}),
        (
            r"nested has the type list.*set data.columns.nested=ignore",
            {"t.parquet": parquet({"nested": [[1], [2]], "y": ["p", "q"]})},
            {},
        ),
        (
            r"nested has the type list.*set data.columns.nested=ignore",
            {"t.parquet": parquet({"nested": [[1], [2]], "y": ["p", "q"]})},
            {"columns": {"nested": "numeric"}},
        ),
        (
            "the label y of .* is neither a number nor a text",
            {"t.parquet": parquet({"a": [1, 2], "y": [[1], [2]]})},
            {},
        ),
        (
            "more than 1,000 different labels",
            {"t.csv": b"a,y\n" + b"".join(b"1,%d\n" % row for row in range(1001))},
            {},
        ),
    ]
    for sentence, files, section in cases:
        with pytest.raises(HeliostatError) as caught:
            read(files, **{"label": "y"} | section)
        assert re.search(sentence, str(caught.value)), (sentence, str(caught.value))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ([], "no objects under"),
        ([".hidden.csv"], "no objects under"),
        (["a.csv", "b/c.png", "b/d.png"], "2 of images, 1 of csv: set data.format"),
        (["a.log", "b.log", "README"], r"2 \*.log, 1 without a suffix"),
    ],
)
def test_a_source_without_one_form_is_refused(
    source: Callable[[dict[str, bytes]], Any], keys: list[str], sentence: str
) -> None:
    with pytest.raises(HeliostatError, match=sentence):
        find_source(DataSpec(source=str(source(dict.fromkeys(keys, b"x")))))


def test_a_form_can_be_chosen_and_a_source_be_one_object(
    source: Callable[[dict[str, bytes]], Any],
) -> None:
    directory = source({"a.csv": b"", "b/c.png": b"", "adult.data": b""})
    found = find_source(DataSpec(source=str(directory), format="images"))
    assert [entry.key for entry in found.entries] == ["b/c.png"]
    assert (found.ignored, found.uri) == (2, str(directory))
    found = find_source(DataSpec(source=str(directory / "adult.data"), format="csv"))
    assert [entry.key for entry in found.entries] == ["adult.data"]
    assert found.uri == f"{directory}/adult.data"


def test_test_files_that_match_nothing_are_refused(
    source: Callable[[dict[str, bytes]], Any],
) -> None:
    place = str(source({"train.csv": CSV, "t10k.csv": CSV}))
    find_source(DataSpec(source=place, split=SplitSpec(test_files="t10k*", test=0.0)))
    with pytest.raises(HeliostatError, match=r"'T10K\*', which matches none of the 2 objects"):
        find_source(DataSpec(source=place, split=SplitSpec(test_files="T10K*", test=0.0)))
