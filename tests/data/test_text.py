"""Texts: what is a document, which tokens it becomes, and that no split knows of another."""

import gzip
import io
import itertools
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from heliostat.data import text
from heliostat.data.encoding import encode, encode_targets
from heliostat.data.features import (
    BlockFeatures,
    TextFeatures,
    features_from_json,
    features_to_json,
    input_of,
)
from heliostat.data.instances import FieldError, parse_instances
from heliostat.data.manifest import load_manifest
from heliostat.data.measure import measure, settle_features, unigram_nats
from heliostat.data.prepare import _fingerprint, prepare, require_prepared, summarise
from heliostat.data.raw import TextLayout, find_source
from heliostat.data.shards import order_of, read_group, split_at, split_of, to_columns, write_shard
from heliostat.data.tokens import (
    END,
    Vocabulary,
    describe_tokenizer,
    encode_texts,
    find_targets,
    guard_end,
    learn_tokenizer,
    load_tokenizer,
    locate_tokens,
    pack,
    parse_tokenizer,
    read_tokenizer,
    refuse_other_tokenizer,
    store_tokenizer,
)
from heliostat.errors import HeliostatError
from heliostat.evaluate import Predictor, predict, score
from heliostat.evaluate.scores import TokenScores
from heliostat.models.tasks import choose_task, following
from heliostat.signature import Blocks, Classes, NextToken, Signature, Text
from heliostat.spec import DataSpec, parse
from heliostat.storage import LocalStore, connect

Source = Callable[[dict[str, bytes]], Path]
Read = Callable[..., Any]
Splits = dict[str, pa.Table]

SMALL: dict[str, Any] = {
    "text": {"vocab": 300, "block": 16},
    "split": {"validation": 0.25, "test": 0.15},
}
LINES = [f"Line {n} of the poem says {'na ' * (n % 7)}to the {n * n}th star.\n" for n in range(400)]
WRITTEN = learn_tokenizer(LINES, 400)
VOCABULARY = describe_tokenizer(WRITTEN, {}, "the tokenizer")
TOKENIZER = parse_tokenizer(WRITTEN, "the tokenizer")
TABLE = b'{"n": 1, "y": "a"}\n{"n": 2, "y": "b"}\n'
LACKING = (
    r"no line of JSON under .* has a text \(a\.jsonl#0: no text in the field text: fields are n, "
    r"y\): .* set data\.text\.column .* a table is given as CSV or Parquet"
)
HALF_A_NAME = b'{"body": "a", "\\ud800": 1}'
ENDS = st.integers(0, 3)
DOCUMENTS = st.lists(st.lists(st.integers(4, 9), min_size=1, max_size=20), min_size=1, max_size=12)


def poems(count: int = 60) -> dict[str, bytes]:
    return {f"{n:02}.txt": "".join(LINES[n : n + n % 9 + 1]).encode() for n in range(count)}


def prepare_here(store: LocalStore, **section: Any) -> tuple[Splits, TextLayout]:
    """What the prepare job does, in one process and with one shard for each split."""
    data = DataSpec(**section)
    source = find_source(data)
    units = text.TEXTS.split(source)
    survey = text.TEXTS.settle(
        source, [text.TEXTS.survey(source.store, unit, data) for unit in units], data
    )
    assert isinstance(survey.layout, TextLayout)
    found = [text.sample_unit(data, survey.layout, source.store, unit) for unit in units]
    written, vocabulary, _ = text.learn_vocabulary(found, survey.layout, data)
    store_tokenizer(store, written)
    layout = replace(survey.layout, vocabulary=vocabulary)
    tables = [rows for unit in units for rows in text.TEXTS.read(source.store, unit, layout)]
    rows = pa.concat_tables(tables)
    keys = zip(rows["id"].to_pylist(), rows["object"].to_pylist(), strict=True)
    orders = [order_of(row_id, key, data.seed, data.split) for row_id, key in keys]
    placed = rows.append_column("order", pa.array(orders)).sort_by("order")
    splits = {}
    for split in ("train", "validation", "test"):
        mine = pa.array([split_at(order) == split for order in sorted(orders)])
        splits[split] = text.TEXTS.finish(store, layout, placed.filter(mine))
    return splits, layout


def blocks_of(table: pa.Table, vocabulary: Vocabulary) -> np.ndarray[Any, Any]:
    dtype = np.uint16 if vocabulary.size <= 2**16 else np.int32
    return np.array([np.frombuffer(value, dtype) for value in table["tokens"].to_pylist()])


def unpack(blocks: np.ndarray[Any, Any], end: int) -> list[list[int]]:
    """The documents in blocks; what stands after the last one is only its end, repeated."""
    flat = blocks.flatten().tolist()
    while len(flat) > 1 and flat[-2:] == [end, end]:
        flat.pop()
    stops = [-1, *(place for place, token in enumerate(flat) if token == end)]
    stops += [] if flat[-1] == end else [len(flat)]
    return [flat[start + 1 : stop] for start, stop in pairwise(stops)]


def decode(tokens: list[int], tokenizer: Tokenizer) -> str:
    decoded: str = tokenizer.decode(tokens, skip_special_tokens=False)
    return decoded


# --- Tokens --------------------------------------------------------------------------------------


@given(st.text(min_size=1) | st.just(f"a{END}b") | st.just("\x00\r\n\t\x7f\u2028\ufeff"))
def test_tokens_give_back_every_text_byte_for_byte(document: str) -> None:
    (ids,) = encode_texts(TOKENIZER, [document])
    assert decode(ids.tolist(), TOKENIZER) == document
    assert VOCABULARY.end not in ids
    assert sum(VOCABULARY.token_bytes[id] for id in ids) == len(document.encode())


def test_equal_texts_give_an_equal_tokenizer_in_whatever_order_they_come() -> None:
    assert learn_tokenizer(LINES, 400) == WRITTEN == learn_tokenizer(reversed(LINES), 400)
    assert learn_tokenizer(LINES[1:], 400) != WRITTEN
    assert (VOCABULARY.size, VOCABULARY.token_bytes[VOCABULARY.end]) == (400, 0)


RUNS = st.tuples(
    st.sampled_from(["a", "7", "-", " ", "\n", "字", "🙂", "na 7."]), st.integers(1, 4000)
)


@given(st.lists(RUNS, min_size=1, max_size=5), st.text(max_size=9))
def test_runs_of_whatever_length_come_back_from_their_tokens(
    runs: list[tuple[str, int]], rest: str
) -> None:
    document = rest.join(letter * count for letter, count in runs)
    (ids,) = encode_texts(TOKENIZER, [document])
    assert decode(ids.tolist(), TOKENIZER) == document


@pytest.mark.parametrize("letters", ["acgt", "a", " ", "7", "-"])
def test_a_text_without_a_gap_is_learned_in_the_time_of_another_of_its_length(letters: str) -> None:
    document = "".join(random.Random(0).choices(letters, k=200_000))
    began = time.process_time()
    tokenizer = parse_tokenizer(learn_tokenizer([document], 1000), "x")
    (ids,) = encode_texts(tokenizer, [document])
    assert time.process_time() - began < 5
    assert decode(ids.tolist(), tokenizer) == document


def test_words_of_ordinary_length_are_those_of_a_byte_level_bpe_elsewhere() -> None:
    parts = TOKENIZER.pre_tokenizer
    usual = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for document in (
        *LINES,
        "It's 7's,\n\n  'tis we'll   \t!!?  字字",
        "x" * 999 + " " * 999 + "y",
    ):
        assert parts.pre_tokenize_str(document) == usual.pre_tokenize_str(document)
    file = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(WRITTEN.decode()))
    long = "ab" * 5000 + LINES[7]
    assert file(long)["input_ids"] == encode_texts(TOKENIZER, [long])[0].tolist()


@given(DOCUMENTS, st.integers(3, 9), ENDS)
def test_blocks_hold_all_documents_in_order_and_say_where_each_begins(
    documents: list[list[int]], length: int, end: int
) -> None:
    arrays = [np.array(document, np.int32) for document in documents]
    blocks, places = pack(arrays, length, end)
    assert unpack(blocks, end) == documents
    for block, (place, offset) in zip(blocks.tolist(), places, strict=True):
        assert [*documents[place], end][offset] == block[0]
    is_followed, _ = find_targets(blocks, end)
    assert is_followed.any(axis=1).all()
    flat = [token for document in documents for token in [*document, end]]
    last = range(length - 1, len(flat), length)
    final = [flat[place] != end for place in last]
    assert is_followed.sum() == sum(map(len, documents)) - sum(final)
    expected = (following(torch.tensor(blocks), end) >= 0).sum(dim=1)
    assert is_followed.sum(axis=1).tolist() == expected.tolist()


# --- Splits --------------------------------------------------------------------------------------


def test_every_document_is_in_the_blocks_of_its_split_and_of_no_other(
    source: Source, tmp_path: Path
) -> None:
    files, store = poems(), LocalStore(str(tmp_path))
    splits, layout = prepare_here(store, source=str(source(files)), **SMALL)
    vocabulary = layout.vocabulary
    assert layout.packed
    assert vocabulary is not None
    tokenizer = load_tokenizer(store, vocabulary.sha256)
    data = DataSpec(source="x", **SMALL)
    by_order = sorted(files, key=lambda key: order_of(key, key, 0, data.split))
    for split, table in splits.items():
        blocks = blocks_of(table, vocabulary)
        stored = [decode(tokens, tokenizer) for tokens in unpack(blocks, vocabulary.end)]
        mine = [key for key in by_order if split_of(key, key, 0, data.split) == split]
        assert stored == [files[key].decode() for key in mine]
        assert len(mine) > 3
        begins = [row_id.partition("@")[0] for row_id in table["id"].to_pylist()]
        assert begins[0] == mine[0]
        assert set(begins) <= set(mine)
        is_followed, _ = find_targets(blocks, vocabulary.end)
        assert table["weight"].to_pylist() == is_followed.sum(axis=1).tolist()


@pytest.mark.parametrize("sample", [1.0, 0.5])
def test_the_tokenizer_knows_the_training_texts_alone(source: Source, sample: float) -> None:
    data = DataSpec(source="x", **SMALL)

    def learn(files: dict[str, bytes]) -> tuple[bytes, int]:
        here = data.model_copy(update={"source": str(source(files))})
        found = find_source(here)
        (unit,) = text.TEXTS.split(found)
        survey = text.TEXTS.settle(found, [text.TEXTS.survey(found.store, unit, here)], here)
        assert isinstance(survey.layout, TextLayout)
        layout = replace(survey.layout, sample=sample)
        samples = text.sample_unit(here, layout, found.store, unit)
        return text.learn_vocabulary([samples], layout, here)[0], len(samples["samples"])

    files = poems()
    training = {key for key in files if split_of(key, key, 0, data.split) == "train"}
    written, count = learn(files)
    assert (count == len(training)) == (sample == 1)
    foreign = {key: files[key] if key in training else b"\xc3\xbc zzz" * 99 for key in files}
    assert learn(foreign) == (written, count)
    assert learn({key: files[key] for key in training}) == (written, count)
    assert learn({key: data + b" more more more" for key, data in files.items()})[0] != written


# --- Documents -----------------------------------------------------------------------------------


def to_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


ROWS = [{"text": f"Text {n}, with\na line", "y": ["no", "yes"][n % 2]} for n in range(9)]
JSONL = "\n".join(map(json.dumps, ROWS)).encode() + b"\n"
CSV = b"y,text\n" + b"".join(f'{row["y"]},"{row["text"]}"\n'.encode() for row in ROWS)


@pytest.mark.parametrize(
    ("files", "data"),
    [
        ({"a.jsonl": JSONL}, {}),
        ({"a.jsonl.gz": gzip.compress(JSONL)}, {}),
        ({"a.csv": CSV}, {"format": "text"}),
        ({"a.parquet": to_parquet(ROWS)}, {"format": "text"}),
    ],
)
def test_a_line_or_row_is_a_document_with_its_class(
    read: Read, files: dict[str, bytes], data: dict[str, Any]
) -> None:
    survey, rows = read(files, label="y", **data)
    assert (survey.rows, survey.labels) == (9, ("no", "yes"))
    assert rows.select(["text", "label"]).to_pylist() == [
        {"text": row["text"], "label": row["y"]} for row in ROWS
    ]
    assert rows["id"].to_pylist() == [f"{key}#{n}" for key in files for n in range(9)]
    assert rows["problem"].null_count == 9
    unlabelled, rows = read(files, **data)
    assert (unlabelled.labels, unlabelled.layout.packed) == ((), True)
    assert rows["label"].null_count == 9


def test_a_file_is_a_document_and_a_folder_its_class(read: Read) -> None:
    texts = {"ham/1.txt": b"\xef\xbb\xbfGr\xc3\xbc\xc3\x9fe\r\n", "spam/2.md": b"Buy"}
    packed = {key + ".gz": gzip.compress(data) for key, data in texts.items()}
    for files in (texts, packed):
        survey, rows = read(files)
        assert (survey.labels, survey.layout.packed) == (("ham", "spam"), False)
        assert rows["text"].to_pylist() == ["Grüße\r\n", "Buy"]
        assert rows["label"].to_pylist() == ["ham", "spam"]
    survey, rows = read(texts, task="language")
    assert (survey.labels, survey.layout.packed) == ((), True)


def test_a_readme_beside_data_of_another_form_is_no_text(read: Read, idx: Any) -> None:
    survey, _ = read({"README.md": b"Data", "t.csv": b"a,y\n1,p\n2,q\n"}, label="y")
    assert survey.rows == 2


@pytest.mark.parametrize(
    ("problem", "key", "data"),
    [
        ("not UTF-8 text", "bad.txt", b"a\xff"),
        ("empty", "bad.txt", b" \n\t"),
        ("not a whole gzip file", "bad.txt.gz", gzip.compress(b"abc" * 99)[:-9]),
        (
            "a document of more than 8 MiB",
            "bad.txt.gz",
            gzip.compress(b"a" * (text.MAX_DOCUMENT_BYTES + 1)),
        ),
        ("not a line of JSON", "bad.jsonl", b"{text: 1}"),
        ("not a line of JSON", "bad.jsonl", b"[" * 100_000),
        ("no text in the field text: fields are body, \\ud800", "bad.jsonl", HALF_A_NAME),
        ("no text in the field text: fields are text", "bad.jsonl", b'{"text": 7}'),
        ("no text in the field text: it is no object", "bad.jsonl", b'["text"]'),
        ("not UTF-8 text", "bad.jsonl", b'{"text": "\\ud800"}'),
        ("not UTF-8 text", "bad.jsonl", b'{"text": "\xff"}'),
        ("empty", "bad.jsonl", b'{"text": ""}'),
    ],
)
def test_what_is_no_document_is_named_with_its_problem(
    read: Read, problem: str, key: str, data: bytes
) -> None:
    survey, rows = read({"good.jsonl": b'{"text": "good"}\n', key: data})
    bad = rows.filter(rows["problem"].is_valid())
    assert survey.rows == rows.num_rows == 2
    assert bad["id"].to_pylist() == [key + "#0" * key.endswith("jsonl")]
    assert bad["problem"][0].as_py().startswith(problem)
    assert bad["text"].null_count == 1


def test_a_text_of_a_class_that_is_too_long_is_a_bad_row(read: Read) -> None:
    _, rows = read({"ham/1.txt": b"a" * (text.MAX_DOCUMENT_BYTES + 1), "spam/2.txt": b"Buy"})
    assert rows["problem"].to_pylist() == [text.TOO_LONG, None]


@pytest.mark.parametrize("code", ["utf-16", "utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("lines", [3, 3000])
def test_no_part_of_a_text_of_another_code_is_learned(read: Read, code: str, lines: int) -> None:
    files = {"a.txt": "".join(f"Rose {i}\n" for i in range(lines)).encode(code), "b.txt": b"Ode\0"}
    _, rows = read(files)
    good = [
        row for row, bad in zip(*rows.select(["id", "problem"]), strict=True) if not bad.as_py()
    ]
    assert [row.as_py() for row in good] == ["b.txt"]
    assert all("save it as UTF-8" in bad for bad in rows["problem"].to_pylist() if bad)


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=60)), st.integers(5, 40))
def test_pieces_are_all_of_a_file_and_cut_no_character_and_no_line_that_is_short(
    lines: list[str], piece_bytes: int
) -> None:
    data = "\n".join(lines).encode()
    pieces = list(text.cut(io.BytesIO(data), piece_bytes))
    assert b"".join(pieces) == data
    assert all(0 < len(piece) <= 2 * piece_bytes for piece in pieces)
    for piece in pieces[:-1]:
        piece.decode()
        assert piece.endswith(b"\n") or b"\n" not in piece


@pytest.mark.parametrize("name", ["book.txt", "book.txt.gz"])
def test_one_large_file_is_many_documents_and_every_split_gets_some(
    source: Source, tmp_path: Path, name: str
) -> None:
    lines = random.Random(0)
    book = "".join(f"{lines.getrandbits(128):032x}\n" for _ in range(20_000)).encode()
    folder = source({name: gzip.compress(book) if name.endswith("gz") else book})
    section = {**SMALL, "split": {"validation": 0.1, "test": 0.1}}
    splits, _ = prepare_here(LocalStore(str(tmp_path / "root")), source=str(folder), **section)
    ids = [table["id"].to_pylist() for table in splits.values()]
    assert all(ids)
    begins = {row_id.split("@")[1] for row_id in itertools.chain(*ids)}
    assert len(begins) > len(book) / text.PIECE_BYTES / 2


def test_bytes_that_are_no_text_are_one_bad_piece(read: Read) -> None:
    line = b"A line of sixteen\n"
    survey, rows = read({"a.txt": line * 2000 + b"\xff\n" + line * 2000})
    (bad,) = rows.filter(rows["problem"].is_valid())["problem"].to_pylist()
    assert "not UTF-8 text" in bad
    assert survey.rows == rows.num_rows > 3


def test_where_nothing_is_left_to_train_on_it_is_said_what_is_wrong(
    source: Source, tmp_path: Path
) -> None:
    folder = str(source({"a.txt": "Grüße".encode("latin-1")}))
    with pytest.raises(HeliostatError, match=r"for training \(a\.txt: not UTF-8 text"):
        prepare_here(LocalStore(str(tmp_path)), source=folder, split={"validation": 0, "test": 0})


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"a.txt": b"Ode", "t.csv": b"text\none\n"}, "texts such as a.txt beside tables such as t"),
        ({"a.json": b'["Ode"]'}, r"a.json is not read: .* \.jsonl"),
        ({"b.jsonl.zst": b"x"}, "b.jsonl.zst is not read: unpack it"),
    ],
)
def test_what_would_be_left_out_or_learned_as_what_it_is_not_is_refused(
    read: Read, files: dict[str, bytes], sentence: str
) -> None:
    with pytest.raises(HeliostatError, match=sentence):
        read(files, format="text")


def test_lines_of_json_have_two_suffixes(read: Read) -> None:
    line = b'{"text": "Ode"}\n'
    _, rows = read({"a.jsonl": line, "b.NDJSON": line, "c.ndjson.gz": gzip.compress(line)})
    assert rows["text"].to_pylist() == ["Ode"] * 3


def test_a_readme_beside_tables_of_texts_is_none_of_them(read: Read) -> None:
    _, rows = read({"README.md": b"Data", "t.csv": b"text\none\ntwo\n"}, format="text")
    assert rows["text"].to_pylist() == ["one", "two"]


def test_what_is_left_out_beside_texts_is_told_by_kind(source: Source) -> None:
    files = {"a.md": b"a", "LICENSE.txt": b"", "t.csv": b"text\none\n", "u.TSV": b"text\ntwo\n"}
    reason = find_source(DataSpec(source=str(source(files)), format="text")).reason
    assert reason == "as data.format says; left out: 1 *.txt, 1 *.md"


def test_numbers_in_lines_of_json_are_no_table(source: Source, tmp_path: Path) -> None:
    data = {"source": str(source({"a.jsonl": TABLE})), "label": "n", "task": "regression"}
    root = tmp_path / "root"
    root.mkdir()
    sentence = r"labels of text are .*: a table is given as CSV or Parquet, \.jsonl is read as text"
    with pytest.raises(HeliostatError, match=sentence):
        prepare(parse({"name": "t", "root": str(root), "data": data, "model": {"kind": "mlp"}}))


def test_a_line_that_is_too_long_is_one_bad_row_and_the_next_one_is_read(read: Read) -> None:
    line = b'{"text": "' + b"a" * text.MAX_LINE_BYTES + b'"}'
    _, rows = read({"a.jsonl": line + b'\n\n{"text": "good"}\n'})
    assert rows["id"].to_pylist() == ["a.jsonl#0", "a.jsonl#2"]
    assert rows["text"].to_pylist() == [None, "good"]


@pytest.mark.parametrize(
    ("sentence", "files", "data"),
    [
        ("leave data.label out", {"a.txt": b"a"}, {"label": "y"}),
        ("leave data.label out", {"a.jsonl": JSONL}, {"label": "y", "task": "language"}),
        ("set data.label to the field", {"a.jsonl": JSONL}, {"task": "classification"}),
        ("of texts one is the class", {"a.jsonl": JSONL}, {"label": ["y", "z"]}),
        ("has no labels", {"a.jsonl": JSONL}, {"label": "z"}),
        (LACKING, {"a.jsonl": TABLE}, {"label": "y"}),
        (LACKING, {"a.jsonl": TABLE}, {}),
        (LACKING, {"README.md": b"About it.", "a.jsonl": TABLE}, {"label": "y"}),
        ("has no column body", {"a.csv": CSV}, {"format": "text", "text": {"column": "body"}}),
        (
            "has no column body",
            {"a.parquet": to_parquet(ROWS)},
            {"format": "text", "text": {"column": "body"}},
        ),
    ],
)
def test_a_section_that_does_not_fit_the_texts_is_refused(
    read: Read, sentence: str, files: dict[str, bytes], data: dict[str, Any]
) -> None:
    with pytest.raises(HeliostatError, match=sentence):
        read(files, **data)


def test_texts_of_which_none_is_for_training_are_refused(source: Source, tmp_path: Path) -> None:
    with pytest.raises(HeliostatError, match="can be used for training"):
        prepare_here(LocalStore(str(tmp_path)), source=str(source({"a.txt": b" "})), **SMALL)


# --- Features ------------------------------------------------------------------------------------

BLOCKS = BlockFeatures(16, 400, VOCABULARY.end, VOCABULARY.sha256, VOCABULARY.token_bytes)
TEXTS = TextFeatures(16, 400, VOCABULARY.sha256)


@pytest.mark.parametrize(
    ("features", "expected"),
    [(BLOCKS, Blocks(16, 400, VOCABULARY.end)), (TEXTS, Text(16, 400))],
)
def test_features_of_tokens_survive_json_and_say_what_a_network_gets(
    features: BlockFeatures | TextFeatures, expected: Blocks | Text
) -> None:
    assert features_from_json(json.loads(json.dumps(features_to_json(features)))) == features
    assert input_of(features) == expected


def test_blocks_come_back_from_a_shard_as_they_were_packed(source: Source, tmp_path: Path) -> None:
    splits, layout = prepare_here(LocalStore(str(tmp_path)), source=str(source(poems())), **SMALL)
    statistics = [measure(layout, splits["train"])]
    features, (note,) = settle_features(layout, statistics, DataSpec(source="x"))
    assert isinstance(features, BlockFeatures)
    data, _, _ = write_shard(splits["train"], 5)
    columns = to_columns(features, pq.read_table(pa.BufferReader(data)))
    assert layout.vocabulary is not None
    blocks = blocks_of(splits["train"], layout.vocabulary)
    (ids,) = encode(features, columns)
    assert ids.dtype == np.dtype(np.int64)
    assert ids.tolist() == blocks.tolist()
    assert encode_targets(NextToken(), columns).tolist() == ids.tolist()
    targets = following(torch.tensor(ids), features.end)
    shares = torch.bincount(targets[targets >= 0]).double() / (targets >= 0).sum()
    entropy = torch.special.entr(shares).sum().item()
    assert unigram_nats(layout, statistics) == pytest.approx(entropy)
    assert f"unigram entropy {entropy:.4f} nats" in note


def test_single_texts_are_cut_padded_and_asked_for_as_they_were_stored(
    source: Source, tmp_path: Path
) -> None:
    files = {f"{'ab'[n % 2]}/{key}": data for n, (key, data) in enumerate(poems().items())}
    splits, layout = prepare_here(LocalStore(str(tmp_path)), source=str(source(files)), **SMALL)
    train = splits["train"]
    features, (note,) = settle_features(layout, [measure(layout, train)], DataSpec(source="x"))
    assert isinstance(features, TextFeatures)
    assert "fill 16 tokens" in note
    assert train.column_names == ["id", "object", "label", "problem", "order", "tokens"]
    tokenizer = load_tokenizer(LocalStore(str(tmp_path)), features.tokenizer)
    texts = [files[key].decode() for key in train["id"].to_pylist()]
    expected = [ids[:16].tolist() for ids in encode_texts(tokenizer, texts)]
    assert train["tokens"].to_pylist() == expected
    padded, lengths = encode(features, to_columns(features, train))
    assert padded.shape == (len(expected), max(map(len, expected)))
    assert lengths.tolist() == list(map(len, expected))
    assert [row[:length] for row, length in zip(padded.tolist(), lengths, strict=True)] == expected
    nothing = encode(features, to_columns(features, train.slice(0, 0)))
    assert [array.shape for array in nothing] == [(0, 1), (0,)]

    class Sums(nn.Module):
        def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
            return torch.stack([ids.sum(dim=1), lengths], dim=1).float() / 1000

    output = Classes(("a", "b"))
    task = choose_task(Signature(input_of(features), output))
    predictor = Predictor(Sums(), task, features, output, tokenizer)
    asked = parse_instances(features, [texts[0], *({"text": other} for other in texts[1:])])
    np.testing.assert_array_equal(
        predict(predictor, asked), predict(predictor, to_columns(features, train))
    )


@pytest.mark.parametrize("instance", ["", " ", 7, None, {"text": 7}, {"text": "a", "b": 1}])
def test_what_is_no_text_is_refused_by_its_path(instance: object) -> None:
    with pytest.raises(FieldError, match=r"instances\[1\]"):
        parse_instances(TEXTS, ["good", instance])


def test_a_model_that_takes_every_token_for_equally_likely_needs_their_logarithm() -> None:
    class Uniform(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return torch.zeros(*ids.shape, BLOCKS.vocab)

    documents = encode_texts(TOKENIZER, LINES[:50])
    blocks, _ = pack(documents, 16, BLOCKS.end)
    task = choose_task(Signature(input_of(BLOCKS), NextToken()))
    scores = score(Predictor(Uniform(), task, BLOCKS, NextToken()), [{"tokens": blocks}])
    assert isinstance(scores, TokenScores)
    targets = following(torch.tensor(blocks), BLOCKS.end)
    predicted = targets[targets >= 0].tolist()
    size = sum(VOCABULARY.token_bytes[token] for token in predicted)
    assert (scores.tokens, scores.bytes) == (len(predicted), size)
    assert scores.loss == pytest.approx(math.log(BLOCKS.vocab), rel=1e-6)
    assert scores.perplexity == pytest.approx(BLOCKS.vocab, rel=1e-5)
    expected = math.log2(BLOCKS.vocab) * len(predicted) / size
    assert scores.bits_per_byte == pytest.approx(expected, rel=1e-6)
    assert f"bits per byte {expected:.4f}" in scores.render()


# --- Tokenizers of others ------------------------------------------------------------------------


def test_the_tokenizer_of_another_marks_cuts_and_ends_as_its_files_say(tmp_path: Path) -> None:
    tokens = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "<stop>", "new", "##er", "york"]
    ids = {token: id for id, token in enumerate(tokens)}
    other = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    other.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    other.add_special_tokens(tokens[:5])
    other.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    other.enable_padding(length=128)
    other.enable_truncation(3)
    other.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    (tmp_path / "config.json").write_text('{"vocab_size": 32}')
    for name in ("", "/tokenizer.json"):
        data, vocabulary, _ = text.read_vocabulary(f"{tmp_path}{name}")
        assert (vocabulary.size, vocabulary.end) == (32, 4)
        assert vocabulary.token_bytes[5:] == (3, 2, 4, *[0] * 24)
    tokenizer = parse_tokenizer(data, "x")
    cut, short = encode_texts(tokenizer, ["newer york new", "york"], 5)
    assert (cut.tolist(), short.tolist()) == ([1, 5, 6, 7, 2], [1, 7, 2])
    assert encode_texts(tokenizer, ["newer york new"])[0].tolist() == [5, 6, 7, 5]
    assert encode_texts(tokenizer, [" "])[0].tolist() == [0]
    (tmp_path / "tokenizer_config.json").unlink()
    assert text.read_vocabulary(str(tmp_path))[1].end == 2


@pytest.mark.parametrize(
    "beside",
    [{"eos_token": "<stop>"}, {"vocab_size": 500}, {"chat_template": "{{ messages }}"}],
)
def test_what_is_said_beside_a_tokenizer_is_part_of_what_was_prepared(
    source: Source, tmp_path: Path, beside: dict[str, Any]
) -> None:
    two_ends = Tokenizer.from_str(WRITTEN.decode())
    two_ends.add_special_tokens(["<stop>"])
    two_ends.save(str(tmp_path / "tokenizer.json"))
    section = {"source": str(source(poems(3))), "text": {"tokenizer": str(tmp_path)}}
    data = DataSpec.model_validate(section)
    found = find_source(data)
    before = _fingerprint(found, data)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 5}')
    assert _fingerprint(found, data) == before
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    assert _fingerprint(found, data) != before


def test_models_of_several_lengths_share_a_tokenizer() -> None:
    line = LINES[0] + LINES[1]
    whole = TOKENIZER.encode(line).ids
    (cut,) = encode_texts(TOKENIZER, [line], 5)
    assert [token.id for token in locate_tokens(TOKENIZER, line, 5)] == cut.tolist() == whole[:5]
    assert TOKENIZER.encode(line).ids == whole


def test_tokens_of_words_with_a_mark_for_the_blank_count_their_bytes() -> None:
    ids = {"</s>": 0, "\u2581the": 1, "<0x0A>": 2, "ü": 3, "\u2581": 4}
    other = Tokenizer(models.BPE(ids, [], byte_fallback=True))
    other.decoder = decoders.Metaspace()
    other.add_special_tokens(["</s>"])
    vocabulary = describe_tokenizer(other.to_str().encode(), {}, "other")
    assert (vocabulary.end, vocabulary.token_bytes) == (0, (0, 4, 1, 2, 1))


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": {"eos_token_id": 300}},
        {"generation_config.json": {"eos_token_id": [300, 0]}, "config.json": {"eos_token_id": 0}},
        {"special_tokens_map.json": {"eos_token": "<stop>"}, "config.json": {"eos_token_id": 0}},
        {
            "tokenizer_config.json": {"eos_token": {"content": "<stop>"}},
            "special_tokens_map.json": {"eos_token": END},
        },
    ],
)
def test_the_end_is_named_by_any_file_beside_a_tokenizer(
    tmp_path: Path, files: dict[str, Any]
) -> None:
    two_ends = Tokenizer.from_str(WRITTEN.decode())
    two_ends.add_special_tokens(["<stop>"])
    stop = two_ends.token_to_id("<stop>")
    two_ends.save(str(tmp_path / "tokenizer.json"))
    for name, told in files.items():
        (tmp_path / name).write_text(json.dumps(told).replace("300", str(stop)))
    data, beside = read_tokenizer(str(tmp_path))
    assert describe_tokenizer(data, beside, "x").end == stop


def test_special_tokens_that_the_weights_have_no_row_for_are_not_counted() -> None:
    padded = Tokenizer.from_str(WRITTEN.decode())
    padded.add_special_tokens(["<pad>"])
    written = padded.to_str().encode()
    rows = {"vocab_size": VOCABULARY.size}
    assert describe_tokenizer(written, {}, "x").size == VOCABULARY.size + 1
    assert describe_tokenizer(written, rows, "x").size == VOCABULARY.size
    assert describe_tokenizer(written, rows | {"eos_token": "<pad>"}, "x").size > VOCABULARY.size
    padded.add_tokens(["a word of its own"])
    assert describe_tokenizer(padded.to_str().encode(), rows, "x").size == VOCABULARY.size + 2


def test_a_document_that_spells_the_end_does_not_end_itself() -> None:
    plain = Tokenizer.from_str(WRITTEN.decode())
    plain.add_tokens([AddedToken("<|eot|>", special=False)])
    written, beside = plain.to_str().encode(), {"eos_token": "<|eot|>"}
    end = describe_tokenizer(written, beside, "x").end
    assert end in parse_tokenizer(written, "x").encode("one<|eot|>two").ids
    guarded = parse_tokenizer(guard_end(written, beside, "x"), "x")
    (ids,) = encode_texts(guarded, ["one<|eot|>two"])
    assert end not in ids
    assert guarded.decode(ids.tolist()) == "one<|eot|>two"
    assert guarded.get_vocab() == plain.get_vocab()
    assert guard_end(WRITTEN, {}, "x") == WRITTEN
    words = Tokenizer(models.WordLevel({"</s>": 0, "one": 1, "?": 2}, unk_token="?"))
    with pytest.raises(HeliostatError, match="'</s>', which ends a document, of a text"):
        guard_end(words.to_str().encode(), {}, "x")


def test_weights_of_another_tokenizer_of_the_same_size_are_refused(tmp_path: Path) -> None:
    store, folder = LocalStore(str(tmp_path / "store")), tmp_path / "weights"
    store_tokenizer(store, WRITTEN)
    folder.mkdir()
    refuse_other_tokenizer(store, VOCABULARY.sha256, str(folder))
    (folder / "tokenizer.json").write_bytes(WRITTEN)
    refuse_other_tokenizer(store, VOCABULARY.sha256, str(folder))
    swapped = json.loads(WRITTEN)
    ids = swapped["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (folder / "tokenizer.json").write_text(json.dumps(swapped))
    with pytest.raises(HeliostatError, match=rf"'a', token {ids['b']} .* token {ids['a']} there"):
        refuse_other_tokenizer(store, VOCABULARY.sha256, str(folder))


def test_a_tokenizer_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeliostatError, match=r"there is no tokenizer\.json in"):
        read_tokenizer(str(tmp_path))
    with pytest.raises(HeliostatError, match=r"is not a tokenizer\.json"):
        parse_tokenizer(b"{}", "x")
    with pytest.raises(HeliostatError, match="no token that ends a document"):
        describe_tokenizer(Tokenizer(models.BPE({"a": 0}, [])).to_str().encode(), {}, "x")
    store = LocalStore(str(tmp_path))
    store.write(f"blobs/{VOCABULARY.sha256}", WRITTEN + b" ")
    with pytest.raises(HeliostatError, match="is not the tokenizer that was stored"):
        load_tokenizer(store, VOCABULARY.sha256)


@pytest.mark.parametrize(
    "beside",
    [
        {"vocab_size": "many"},
        {"vocab_size": [1], "eos_token": ["x"], "chat_template": 5},
        {"chat_template": ["default"], "eos_token": {"content": {}}},
        {"chat_template": [{"name": ["default"]}, {"name": "default"}]},
    ],
)
def test_what_a_third_party_wrote_beside_a_tokenizer_need_not_make_sense(
    beside: dict[str, Any],
) -> None:
    assert describe_tokenizer(WRITTEN, beside, "x") == VOCABULARY


@pytest.mark.parametrize("text", ["[1, 2]", "{", "null", '"x"'])
def test_a_config_that_is_no_object_is_as_good_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(WRITTEN)
    (tmp_path / "config.json").write_text(text)
    assert read_tokenizer(str(tmp_path)) == (WRITTEN, {})


def test_a_vocabulary_without_end_is_refused() -> None:
    with pytest.raises(HeliostatError, match=r"1,000,000,000,000 tokens, at most 4,194,304"):
        describe_tokenizer(WRITTEN, {"vocab_size": 10**12}, "x")


# --- The job -------------------------------------------------------------------------------------


@pytest.mark.cluster
def test_a_corpus_is_prepared_to_the_same_version_however_it_is_cut_into_tasks(
    cluster: object, bucket: str, source: Source, tmp_path: Path
) -> None:
    files = poems(90) | {"bad.txt": b"\xff"}
    section = {**SMALL, "max_bad_rows": 1}
    document = {"name": "poems", "root": bucket, "model": {"kind": "gpt"}}
    spec = parse({**document, "data": {"source": f"{bucket}-raw", **section}})
    raw, store = connect(spec.data.source), connect(bucket)
    for key, data in files.items():
        raw.write(key, data)
    manifest = prepare(spec)
    good = {key: data for key, data in files.items() if key != "bad.txt"}
    splits, layout = prepare_here(LocalStore(str(tmp_path)), source=str(source(good)), **SMALL)
    assert layout.vocabulary is not None
    assert isinstance(manifest.features, BlockFeatures)
    assert manifest.output == NextToken()
    assert manifest.features.tokenizer == layout.vocabulary.sha256
    load_tokenizer(store, manifest.features.tokenizer)
    for split, table in splits.items():
        stored = pa.concat_tables(
            read_group(store, shard, index)
            for shard in manifest.shards_of(split)
            for index in range(len(shard.groups))
        )
        assert stored.select(["tokens", "weight"]).equals(table.select(["tokens", "weight"]))
        assert manifest.rows[split] == table.num_rows
    assert manifest.report["rows_read"] == 91
    assert 0 < manifest.report["unigram_nats"] < math.log(300)
    assert "1 bad rows of 91" in summarise(manifest)
    assert (
        prepare(spec) == require_prepared(spec) == load_manifest(store, "poems", manifest.version)
    )
