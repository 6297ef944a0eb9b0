"""Texts as raw data: a file a document, or a document per line of JSON or row of a table."""

import codecs
import gzip
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby, islice
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from heliostat.data.cells import clean_text
from heliostat.data.columns import plain, to_names
from heliostat.data.delimited import open_csv
from heliostat.data.features import TEXT, TOKENS, token_type
from heliostat.data.parquet import open_parquet
from heliostat.data.raw import (
    BROKEN_STREAM,
    MAX_LABELS,
    SURROGATES,
    Form,
    Found,
    Source,
    Survey,
    TextLayout,
    Unit,
    Unusable,
    folder_of,
    group_files,
    open_raw,
    raw_rows,
    sort_labels,
    tell_unusable,
)
from heliostat.data.shards import ORDER_BITS, WEIGHT, order_of, split_at
from heliostat.data.tables import BATCH_ROWS
from heliostat.data.tally import drop_words
from heliostat.data.tokens import (
    Vocabulary,
    describe_tokenizer,
    encode_texts,
    find_targets,
    guard_end,
    learn_tokenizer,
    load_tokenizer,
    pack,
    read_tokenizer,
)
from heliostat.errors import HeliostatError, printable
from heliostat.spec import DataSpec
from heliostat.storage import Store

MIB = 1024 * 1024
MAX_DOCUMENT_BYTES = 8 * MIB  # a task needs 120 times that to find its tokens
MAX_LINE_BYTES = 6 * MAX_DOCUMENT_BYTES  # JSON may write a byte of text as \u0000
# A file is one document, but a book or a dump is cut at line ends: above CUT_BYTES, and where there
# are few files, above that of a piece; else a split would get all or nothing of it.
PIECE_BYTES = 16 * 1024
CUT_BYTES = MIB
FEW_FILES = 20
SAMPLE_BYTES = 256 * MIB
BATCH_BYTES = 16 * MIB
PARALLEL_READS = 8
TABLE_ROWS = 256
MAX_TOLD = 3
MAX_LISTED = 20
MAX_NAMES = 200  # characters
LINES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
OTHERS = {  # what names say that no text here is
    (".json", ".json.gz"): "write each text as a line of JSON in a .jsonl file",
    (".zst", ".bz2", ".xz", ".zip"): "unpack it, or pack it with gzip",
}
PARQUET_SUFFIXES = (".parquet", ".pq")
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
MAX_ZEROS = 0.25
TABLES = (*PARQUET_SUFFIXES, ".csv", ".csv.gz", ".tsv", ".tsv.gz")
NO_TEXT = "no text in the field"
GZIP = b"\x1f\x8b"
TOO_LONG = f"a document of more than {MAX_DOCUMENT_BYTES // MIB} MiB: cut it into several"


@dataclass(frozen=True)
class Document:
    """A text, or the `problem` with it; `object` is the key of what it was read from."""

    id: str
    object: str
    text: str | None
    label: str | None
    problem: str | None


Files = list[tuple[str, int]]  # keys and sizes
Learned = tuple[bytes, Vocabulary, str]  # a tokenizer.json, what is known of it, and why


# --- The form ------------------------------------------------------------------------------------


def _survey(store: Store, unit: Unit, data: DataSpec) -> Found:
    """How many documents there are, their bytes, those of training, and their classes.

    A file that is one document is not read: its listing says enough.
    """
    layout = replace(_layout_of(data, packed=_label(data) is None), cut_bytes=unit["cut_bytes"])
    labels, rows, total, training = set[str](), 0, 0, 0
    unusable = Unusable()
    lines, lacking, lacked = 0, 0, ""
    for key, size in unit["files"]:
        is_read = not _is_whole(key) or _is_cut(layout, size)
        if is_read:
            documents = _read_key(store, layout, (key, size))
        else:
            documents = iter([Document(key, key, None, None, None)])
        if _is_whole(key) and (folder := folder_of(key)) and len(labels) <= MAX_LABELS:
            labels.add(folder)
        for document in documents:
            if document.problem != _no_label(layout):  # of which sort_labels tells
                unusable.add(document.id, document.problem)
            length = len((document.text or "").encode()) if is_read else size
            place = order_of(document.id, key, data.seed, data.split)
            rows, total = rows + 1, total + length
            training += length if split_at(place) == "train" else 0
            lines += key.lower().endswith(LINES)
            if document.problem and document.problem.startswith(NO_TEXT):
                lacking += 1
                lacked = lacked or f"{document.id}: {document.problem}"
            if document.label is not None and len(labels) <= MAX_LABELS:
                labels.add(document.label)
    return {
        "labels": sorted(labels),
        "rows": rows,
        "bytes": total,
        "training": training,
        "unusable": unusable.count,
        "example": unusable.example,
        "lines": lines,
        "lacking": lacking,
        "lacked": lacked,
    }


def _settle(source: Source, found: list[Found], data: DataSpec) -> Survey:
    _check_lines(source, found, data)
    packed, why_task = _choose_task(source, data)
    labels = {label for part in found for label in part["labels"]}
    sums = {name: sum(part[name] for part in found) for name in ("rows", "bytes", "training")}
    sample = min(1.0, SAMPLE_BYTES / max(sums["training"], 1))
    place = f"the field {_label(data)}" if _label(data) else "a folder a class"
    uri = source.store.uri
    return Survey(
        replace(_layout_of(data, packed), sample=sample, cut_bytes=_cut_bytes(source)),
        () if packed else sort_labels(labels, f"{uri} ({place})", tell_unusable(found, uri)),
        sums["rows"],
        sums["bytes"] / max(sums["rows"], 1),
        (why_task,),
    )


def _check_lines(source: Source, found: list[Found], data: DataSpec) -> None:
    """Refuse lines of JSON that are a table; beside files that are texts they are bad rows."""
    rows, lines, lacking = (sum(part[n] for part in found) for n in ("rows", "lines", "lacking"))
    if lacking and lacking == lines and (lines == rows or _label(data)):
        example = next(part["lacked"] for part in found if part["lacked"])
        raise HeliostatError(
            f"no line of JSON under {source.store.uri} has a text ({example}): they are read as "
            "texts, so set data.text.column to the field of the text; a table is given as CSV or "
            "Parquet"
        )


def _choose_task(source: Source, data: DataSpec) -> tuple[bool, str]:
    """Whether the texts themselves are learned, and why."""
    label, whole = _label(data), [_is_whole(entry.key) for entry in source.entries]
    if label and (data.task == "language" or all(whole)):
        raise HeliostatError(
            f"data.label is {label!r}, but nothing here is a class in a field: the texts are "
            f"{'files' if all(whole) else 'learned themselves'}, so leave data.label out"
        )
    if data.task == "classification" and not label and not all(whole):
        raise HeliostatError(
            "data.task is classification: set data.label to the field of the class"
        )
    if data.task != "auto":
        return data.task == "language", f"task {data.task} - as data.task says"
    if label:
        return False, f"task classification - data.label is {label}"
    folders = {folder_of(entry.key) for entry in source.entries}
    if not all(whole) or None in folders or len(folders) < 2:
        return True, "task language - there is no data.label and no folder per class"
    return False, (
        f"task classification - every text lies in one of {len(folders):,} folders; set data.task "
        "to language to learn the texts themselves"
    )


def _layout_of(data: DataSpec, packed: bool) -> TextLayout:
    return TextLayout(packed, data.text.block, data.text.column, None if packed else _label(data))


def _label(data: DataSpec) -> str | None:
    if isinstance(data.label, tuple):
        raise HeliostatError(
            f"data.label names {len(data.label)} fields: of texts one is the class"
        )
    return data.label


def _split(source: Source) -> list[Unit]:
    for entry in source.entries:
        for suffixes, advice in OTHERS.items():
            if entry.key.lower().endswith(suffixes):
                raise HeliostatError(f"{source.store.uri}/{entry.key} is not read: {advice}")
    cut_bytes = _cut_bytes(source)
    return [{**unit, "cut_bytes": cut_bytes} for unit in group_files(source)]


def _cut_bytes(source: Source) -> int:
    """Files of more are cut, where the texts themselves are learned."""
    return PIECE_BYTES if len(source.entries) < FEW_FILES else CUT_BYTES


def _is_cut(layout: TextLayout, size: int) -> bool:
    return layout.packed and size > layout.cut_bytes


def _read(store: Store, unit: Unit, layout: TextLayout) -> Iterator[pa.Table]:
    batch, size = list[Document](), 0
    for document in _read_unit(store, unit["files"], layout):
        batch.append(document)
        size += len(document.text or "")
        if size >= BATCH_BYTES or len(batch) == BATCH_ROWS:
            yield _to_rows(batch, layout)
            batch, size = [], 0
    if batch:
        yield _to_rows(batch, layout)


def _to_rows(batch: list[Document], layout: TextLayout) -> pa.Table:
    names = ("id", "object", "label", "problem", "text")
    ids, objects, labels, problems, texts = (
        [getattr(document, name) for document in batch] for name in names
    )
    payload = {TEXT: pa.array(texts, pa.large_string())}
    return raw_rows(layout, ids, objects, labels, problems, payload)


def _finish(store: Store, layout: TextLayout, rows: pa.Table) -> pa.Table:
    """Blocks of packed documents, each with the document that it begins in, or texts one by one."""
    assert layout.vocabulary is not None
    tokenizer = load_tokenizer(store, layout.vocabulary.sha256)
    texts, dtype = rows[TEXT].to_pylist(), token_type(layout.vocabulary.size)
    if layout.packed:
        return _to_blocks(rows["id"].to_pylist(), encode_texts(tokenizer, texts), layout)
    ids = encode_texts(tokenizer, texts, layout.block)
    stops = np.cumsum([0, *map(len, ids)], dtype=np.int32)
    lists = pa.ListArray.from_arrays(stops, np.concatenate(ids).astype(dtype))
    return rows.drop_columns([TEXT]).append_column(TOKENS, lists)


def _to_blocks(ids: list[str], documents: list[Any], layout: TextLayout) -> pa.Table:
    vocabulary = layout.vocabulary
    assert vocabulary is not None
    blocks, places = pack(documents, layout.block, vocabulary.end)
    stored = blocks.astype(token_type(vocabulary.size))
    kind = pa.binary(layout.block * stored.itemsize)
    is_followed, _ = find_targets(blocks, vocabulary.end)
    return pa.table(
        {
            "id": pa.array([f"{ids[place]}@{offset}" for place, offset in places], pa.string()),
            TOKENS: pa.Array.from_buffers(kind, len(blocks), [None, pa.py_buffer(stored)]),
            WEIGHT: pa.array(is_followed.sum(axis=1), pa.int32()),
        }
    )


# --- Documents -----------------------------------------------------------------------------------


def _is_whole(key: str) -> bool:
    """Whether the object is one document."""
    return not key.lower().endswith((*LINES, *TABLES))


def _read_unit(store: Store, files: Files, layout: TextLayout) -> Iterator[Document]:
    """Every document of the files, good or bad; files that are one are read several at a time."""
    read = partial(_read_key, store, layout)
    for is_whole, group in groupby(files, lambda file: _is_whole(file[0])):
        if not is_whole:
            yield from chain.from_iterable(map(read, group))
            continue
        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            while some := list(islice(group, PARALLEL_READS)):
                yield from chain.from_iterable(pool.map(lambda file: list(read(file)), some))


def _read_key(store: Store, layout: TextLayout, file: tuple[str, int]) -> Iterator[Document]:
    key = file[0].lower()
    read = (
        _read_lines if key.endswith(LINES) else _read_table if key.endswith(TABLES) else _read_file
    )
    for document in read(store, layout, *file):
        yield _check(document, layout)


def _check(document: Document, layout: TextLayout) -> Document:
    """The document with the first problem that there is."""
    text, problem = document.text, document.problem
    if problem is None and (text is None or not text.strip()):
        problem = "empty"
    if problem is None and text is not None and len(text.encode()) > MAX_DOCUMENT_BYTES:
        problem = TOO_LONG
    if problem is None and not layout.packed and document.label is None:
        problem = _no_label(layout)
    return replace(document, text=None if problem else text, problem=problem)


def _no_label(layout: TextLayout) -> str:
    return f"no {layout.label}" if layout.label else "not in a class folder"


def _read_file(store: Store, layout: TextLayout, key: str, size: int) -> Iterator[Document]:
    if _is_cut(layout, size):
        yield from _read_pieces(store, key)
        return
    text: str | None = None
    problem: str | None = TOO_LONG
    if size <= MAX_DOCUMENT_BYTES:
        text, problem = _unpack(store.read(key))
    yield Document(key, key, text, None if layout.packed else folder_of(key), problem)


def _read_pieces(store: Store, key: str) -> Iterator[Document]:
    """A file as documents of about PIECE_BYTES, each named by its place in the file."""
    place = 0
    try:
        with open_raw(store, key) as stream:
            for piece in cut(stream):
                text, problem = _decode(piece)
                yield Document(f"{key}@{place}", key, text, None, problem)
                place += len(piece)
    except HeliostatError as error:
        yield Document(f"{key}@{place}", key, None, None, str(error))


def cut(stream: BinaryIO, piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
    """All of the stream in pieces of `piece_bytes` or up to twice that; one ends with a line, or
    where there is none with a character of UTF-8."""
    rest = b""
    while more := _read_full(stream, piece_bytes):
        piece = rest + more
        end = piece.rfind(b"\n") + 1 or _count_whole(piece)
        yield piece[:end]
        rest = piece[end:]
    if rest:
        yield rest


def _read_full(stream: BinaryIO, size: int) -> bytes:
    """So many bytes, fewer only at the end of the stream."""
    data = b""
    while len(data) < size and (more := stream.read(size - len(data))):
        data += more
    return data


def _count_whole(piece: bytes) -> int:
    """How many bytes come before the last character, which may be cut; all of what is no UTF-8."""
    begins = (len(piece) - n for n in range(1, 5) if piece[-n:][:1] >= b"\xc0")
    return next(begins, 0) or len(piece)


def _decode(data: bytes) -> tuple[str | None, str | None]:
    """The text, or what is wrong with it; one of two bytes a letter is told by its zeros."""
    if data.startswith(UTF_16) or data.count(0) > MAX_ZEROS * len(data):
        return None, "UTF-16 text, or no text at all: save it as UTF-8"
    try:
        return data.decode("utf-8-sig"), None
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 text: {error.reason}: save it as UTF-8"


def _unpack(data: bytes) -> tuple[str | None, str | None]:
    """The text of a file, or what is wrong with it."""
    try:
        if data.startswith(GZIP):
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MAX_DOCUMENT_BYTES + 1)
    except BROKEN_STREAM as error:
        return None, f"not a whole gzip file: {error}"
    return _decode(data)


def _read_lines(store: Store, layout: TextLayout, key: str, size: int) -> Iterator[Document]:
    with open_raw(store, key) as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES):
            if line.strip():
                yield _parse_line(line, layout, f"{key}#{number}", key)
            number += 1
            while not line.endswith(b"\n") and line:  # the rest of a line that is too long
                line = stream.readline(MAX_LINE_BYTES)


def _parse_line(line: bytes, layout: TextLayout, row_id: str, key: str) -> Document:
    bad = partial(Document, row_id, key, None, None)
    if len(line) == MAX_LINE_BYTES:
        return bad(TOO_LONG)
    try:
        fields = json.loads(line)
    except UnicodeDecodeError as error:
        return bad(f"not UTF-8 text: {error.reason}")
    except (ValueError, RecursionError):
        return bad("not a line of JSON")
    text = fields.get(layout.column) if isinstance(fields, dict) else None
    if not isinstance(text, str):
        return bad(f"{NO_TEXT} {layout.column}: {_describe_fields(fields)}")
    if SURROGATES.search(text):
        return bad("not UTF-8 text: half of a surrogate pair")
    label = _parse_label(fields.get(layout.label)) if layout.label else None
    return Document(row_id, key, text, label, None)


def _describe_fields(fields: object) -> str:
    if not isinstance(fields, dict):
        return "it is no object"
    names = printable(", ".join(islice(fields, MAX_LISTED)))
    told = names if len(names) <= MAX_NAMES else f"{names[:MAX_NAMES]}..."
    return f"fields are {told}{', ...' * (len(fields) > MAX_LISTED)}" if fields else "no fields"


def _parse_label(value: object) -> str | None:
    if isinstance(value, str) and not SURROGATES.search(value):
        return clean_text(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value) if isinstance(value, bool | int | float) else None


def _read_table(store: Store, layout: TextLayout, key: str, size: int) -> Iterator[Document]:
    names = [name for name in (layout.column, layout.label) if name]
    with _open_table(store, key, names) as batches:
        first = 0
        for problems, columns in batches:
            texts = columns[layout.column].cast(pa.large_string()).to_pylist()
            labels = to_names(columns[layout.label]).to_pylist() if layout.label else problems
            for row, (text, label, problem) in enumerate(
                zip(texts, labels, problems, strict=True), start=first
            ):
                yield Document(f"{key}#{row}", key, text, label, problem)
            first += len(problems)


Columns = Iterator[tuple[list[str | None], dict[str, pa.Array]]]  # with the problem of each row


@contextmanager
def _open_table(store: Store, key: str, names: list[str]) -> Iterator[Columns]:
    if key.lower().endswith(PARQUET_SUFFIXES):
        with open_parquet(store, key) as file:
            _check_names(names, file.schema_arrow.names, f"{store.uri}/{key}")
            parts = file.iter_batches(TABLE_ROWS, columns=names)
            yield (
                ([None] * part.num_rows, {name: plain(part.column(name)) for name in names})
                for part in parts
            )
        return
    with open_csv(store, key) as (header, batches):
        _check_names(names, header, f"{store.uri}/{key}")
        yield (
            (batch.problems, {**batch.columns, **_drop_words(batch.columns, names[1:])})
            for batch in batches
        )


def _drop_words(columns: dict[str, pa.Array], labels: list[str]) -> dict[str, pa.Array]:
    return {name: drop_words(columns[name]) for name in labels}


def _check_names(names: list[str], columns: list[str], place: str) -> None:
    if missing := [name for name in names if name not in columns]:
        raise HeliostatError(
            f"{place} has no column {missing[0]}: set data.text.column or data.label to one of "
            f"{', '.join(columns)}"
        )


# --- The tokenizer -------------------------------------------------------------------------------


def sample_unit(data: DataSpec, layout: TextLayout, store: Store, unit: Unit) -> Found:
    """The training documents of a unit whose order falls into the share `layout.sample`, and what
    is wrong with some that cannot be used."""
    limit = int(layout.sample * (1 << ORDER_BITS))

    def place(row_id: str, key: str) -> int:
        return order_of(row_id, key, data.seed, data.split)

    files = [
        (key, size)
        for key, size in unit["files"]
        if not _is_whole(key) or _is_cut(layout, size) or place(key, key) < limit
    ]
    samples, problems = list[tuple[int, str, str | None]](), list[str]()
    for document in _read_unit(store, files, layout):
        if document.problem:
            problems.append(f"{document.id}: {document.problem}")
        elif (order := place(document.id, document.object)) < limit:
            samples.append((order, document.id, document.text))
    return {"samples": samples, "problems": problems[:MAX_TOLD]}


def learn_vocabulary(found: list[Found], layout: TextLayout, data: DataSpec) -> Learned:
    """A tokenizer of what `sample_unit` found, of SAMPLE_BYTES at most.

    Raises:
        HeliostatError: there is no training document.
    """
    texts, size = list[str](), 0
    for _, _, text in sorted(chain.from_iterable(part["samples"] for part in found)):
        size += len(text.encode())
        if texts and size > SAMPLE_BYTES:
            break
        texts.append(text)
    if not texts:
        problems = list(chain.from_iterable(part["problems"] for part in found))[:MAX_TOLD]
        what = f"no text under {data.source} can be used for training"
        if problems:
            raise HeliostatError(f"{what} ({'; '.join(problems)}): mend these, or give other texts")
        raise HeliostatError(
            f"{what}: give more texts, or lower data.split.validation and data.split.test"
        )
    written = learn_tokenizer(texts, data.text.vocab)
    vocabulary = describe_tokenizer(written, {}, "the tokenizer")
    part = "the" if layout.sample == 1 else f"a sample of {layout.sample:.2%} of the"
    reason = f"byte-level BPE of {part} training texts ({len(texts):,}, {size / MIB:,.1f} MiB)"
    if vocabulary.size < data.text.vocab:
        reason += f"; not {data.text.vocab:,}, as no other pair of tokens occurs twice there"
    return written, vocabulary, f"vocabulary of {vocabulary.size:,} tokens - {reason}"


def read_vocabulary(uri: str) -> Learned:
    """The tokenizer that a spec names.

    Raises:
        HeliostatError: there is none, or none that a document can be ended with.
    """
    given, beside = read_tokenizer(uri)
    written = guard_end(given, beside, uri)
    vocabulary = describe_tokenizer(written, beside, uri)
    reason = f"as data.text.tokenizer is {uri}; {vocabulary.end} ends a document"
    return written, vocabulary, f"vocabulary of {vocabulary.size:,} tokens - {reason}"


TASKS = ("language", "classification")
TEXTS = Form(_split, _survey, _settle, _read, TASKS, _finish)
