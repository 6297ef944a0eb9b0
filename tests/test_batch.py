"""Batch prediction: every row once, as offline, whatever interrupts it."""

import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
from PIL import Image

from heliostat import registry
from heliostat.batch import (
    Piece,
    Plan,
    check_bad,
    find_done,
    list_units,
    make_plan,
    predict_all,
    predict_unit,
)
from heliostat.data.encoding import stack_series
from heliostat.data.tokens import store_tokenizer
from heliostat.errors import HeliostatError
from heliostat.evaluate import load_predictor, predict
from heliostat.local import Cluster
from heliostat.spec import RunSpec, dump, parse
from heliostat.storage import LocalStore, Store, connect
from serving import EVERY, TOKENIZER

MODELS = {
    "shapes": {"kind": "mlp", "hidden": [8]},
    "people": {"kind": "mlp", "hidden": [8]},
    "prices": {"kind": "mlp", "hidden": [8]},
    "ratings": {"kind": "recsys", "embedding": 4, "hidden": [8]},
    "mails": {"kind": "encoder", "layers": 1, "width": 8, "heads": 2},
    "sounds": {"kind": "rnn", "width": 6},
}
CSV = b"job,age,note\ncook,41,a\nsmith,,b\npilot,x,c\ncook,3\ncook,7,d\n"
PEOPLE = {"a.csv": CSV, "b/c.csv": b"note,age,job\nz,50,cook\n", "b/d.csv": b"age,job,note\n"}


def make_spec(root: Path | str, name: str, source: Path | str, **options: Any) -> RunSpec:
    return parse(
        {
            "name": name,
            "root": str(root),
            "data": {"source": "raw", "label": "y"},
            "model": MODELS[name],
            "predict": {"source": str(source), **options},
        }
    )


def publish(store: Store, name: str) -> registry.Version:
    """The model of that name in `serving`, with the digest of a tokenizer that is really there."""
    served = EVERY[name]
    known = {field.name: getattr(served.version, field.name) for field in fields(registry.Draft)}
    if known["features"]["kind"] == "text":
        store_tokenizer(store, TOKENIZER)
        known["features"] = {**known["features"], "tokenizer": sha256(TOKENIZER).hexdigest()}
    spec = dump(make_spec(store.uri, name, "raw"))
    draft = registry.Draft(**{**known, "spec": spec})
    weights = safetensors.torch.save(served.predictor.network.state_dict())
    return registry.publish(store, draft, weights)


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for key, data in files.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def work(plan: Plan, source: Any) -> dict[int, Piece]:
    """What is missing, in this process."""
    done = find_done(plan)
    predictor = load_predictor(plan.store, plan.version)
    for number, unit in enumerate(list_units(source)):
        if number not in done:
            done[number] = predict_unit(plan, predictor, number, unit)
    return done


def run(
    root: Path, name: str, files: dict[str, bytes], **options: Any
) -> tuple[Store, dict[int, Piece]]:
    store = connect(str(root / "root"))
    version = publish(store, name)
    spec = make_spec(root / "root", name, put(root / "raw", files), **options)
    source, plan = make_plan(store, version, spec)
    return store, work(plan, source)


def read(store: Store, pieces: dict[int, Piece]) -> list[dict[str, Any]]:
    tables = [pq.read_table(io.BytesIO(store.read(piece.key))) for piece in pieces.values()]
    return pa.concat_tables(tables).to_pylist()  # type: ignore[no-any-return]


def read_bad(store: Store) -> dict[tuple[str, int], str]:
    keys = [entry.key for entry in store.list("predictions/") if entry.key.endswith(".bad.parquet")]
    rows = [row for key in keys for row in pq.read_table(io.BytesIO(store.read(key))).to_pylist()]
    return {(row["source"], row["row"]): row["problem"] for row in rows}


def test_rows_of_tables_are_predicted_as_offline_and_bad_ones_are_named(tmp_path: Path) -> None:
    store, pieces = run(tmp_path, "people", PEOPLE)
    rows = read(store, pieces)
    good = [("a.csv", 0), ("a.csv", 1), ("a.csv", 4), ("b/c.csv", 0)]
    assert [(row["source"], row["row"]) for row in rows] == good
    columns = {
        "numbers": np.array([[41.0], [np.nan], [7.0], [50.0]]),
        "x.job": np.array(["cook", "smith", "cook", "cook"], object),
    }
    offline = predict(EVERY["people"].predictor, columns)
    assert np.allclose([row["probabilities"] for row in rows], offline, atol=1e-6)
    assert [row["probability"] for row in rows] == [max(row["probabilities"]) for row in rows]
    assert read_bad(store) == {
        ("a.csv", 2): "column age is not a number of at most 1e+100: 'x'",
        ("a.csv", 3): "2 fields instead of 3",
    }
    assert sum(piece.bad for piece in pieces.values()) == 2


def test_numbers_stand_in_columns_and_a_required_one_may_not_be_missing(tmp_path: Path) -> None:
    store, pieces = run(tmp_path, "ratings", {"r.csv": b"user,item,age\n1,a,30\n2,b,\n9,z,31\n"})
    assert [row["row"] for row in read(store, pieces)] == [0, 2]
    (problem,) = read_bad(store).values()
    assert problem == "column age is missing, and training saw no row without it"
    store, pieces = run(tmp_path / "other", "prices", PEOPLE)
    assert set(read(store, pieces)[0]) == {"source", "row", "y.low", "y.high"}


def test_a_blank_line_in_a_file_of_one_column_has_its_number(tmp_path: Path) -> None:
    store, pieces = run(tmp_path, "mails", {"t.csv": b"text\nhello\n\nbye\n"})
    assert [row["row"] for row in read(store, pieces)] == [0, 2]
    assert read_bad(store) == {("t.csv", 1): "empty"}


def test_columns_of_files_without_names_are_named_by_the_spec(tmp_path: Path) -> None:
    rows, header = b"cook,41\nsmith,7\n", ("job", "age")
    store, pieces = run(tmp_path / "named", "people", {"a.csv": b"job,age\n" + rows})
    bare, nameless = run(tmp_path / "bare", "people", {"a.csv": rows}, header=header)
    assert read(bare, nameless) == read(store, pieces)


def make_idx(values: np.ndarray[Any, Any]) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes((0, 0, 8, values.ndim)) + sizes + values.astype(np.uint8).tobytes()


def test_idx_files_are_read_with_or_without_their_labels(tmp_path: Path) -> None:
    pixels = np.arange(5 * 16).reshape(5, 4, 4) * 3
    files = {
        "a-images-idx3-ubyte": make_idx(pixels),
        "a-labels-idx1-ubyte": make_idx(np.zeros(5)),
        "b/images.idx3-ubyte.gz": gzip.compress(make_idx(pixels[:2])),
    }
    store, pieces = run(tmp_path, "shapes", files)
    rows = read(store, pieces)
    assert [(row["source"], row["row"]) for row in rows] == [
        *(("a-images-idx3-ubyte", number) for number in range(5)),
        *(("b/images.idx3-ubyte.gz", number) for number in range(2)),
    ]
    offline = predict(
        EVERY["shapes"].predictor, {"image": pixels[..., np.newaxis].astype(np.uint8)}
    )
    found = [row["probabilities"] for row in rows]
    assert np.allclose(found, np.concatenate([offline, offline[:2]]), atol=1e-6)
    with pytest.raises(HeliostatError, match="labels alone: give IDX files of images"):
        run(tmp_path / "other", "shapes", {"labels-idx1-ubyte": make_idx(np.zeros(3))})


SERIES_HEADER = "@problemName x\n@timeStamps false\n@classLabel {}\n@data\n"


def test_series_are_read_with_or_without_their_labels(tmp_path: Path) -> None:
    cases = ["1,2,3:4,5,6", "7,?:8,9", "1,2", "1,2,3,4,5,6,7:1,2,3,4,5,6,7", "x:1"]
    plain = SERIES_HEADER.format("false") + "\n".join(cases)
    labelled = SERIES_HEADER.format("true a b") + "\n".join(f"{case}:a" for case in cases)
    files = {"a.ts": plain.encode(), "b.ts": labelled.encode()}
    store, pieces = run(tmp_path, "sounds", files)
    rows = read(store, pieces)
    assert [(row["source"], row["row"]) for row in rows] == [
        (key, row) for key in ("a.ts", "b.ts") for row in (0, 1)
    ]
    series = [[[1, 4], [2, 5], [3, 6]], [[7, 8], [np.nan, 9]]]
    columns = {"series": stack_series([np.array(one, np.float32) for one in series])}
    offline = predict(EVERY["sounds"].predictor, columns)
    found = [row["probabilities"] for row in rows]
    assert np.allclose(found, np.concatenate([offline, offline]), atol=1e-6)
    assert read_bad(store) == {
        (key, row): problem
        for key in ("a.ts", "b.ts")
        for row, problem in (
            (2, "1 channels instead of 2"),
            (3, "7 steps, the model reads 6"),
            (4, "a value is not a number"),
        )
    }


def test_parquet_is_read_like_csv(tmp_path: Path) -> None:
    table = pa.table({"job": ["cook", None], "age": [41, 50], "other": [[1], [2]]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    store, pieces = run(tmp_path, "people", {"a.parquet": buffer.getvalue()})
    assert [row["row"] for row in read(store, pieces)] == [0, 1]


def test_images_need_no_class_folder(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    files = {"a.png": file.getvalue(), "b/b.png": file.getvalue(), "c.png": b"x"}
    store, pieces = run(tmp_path, "shapes", files)
    rows = read(store, pieces)
    assert [(row["source"], row["row"]) for row in rows] == [("a.png", 0), ("b/b.png", 0)]
    offline = predict(EVERY["shapes"].predictor, {"image": pixels[np.newaxis, ..., np.newaxis]})
    assert np.allclose(rows[0]["probabilities"], offline[0], atol=1e-6)
    assert list(read_bad(store)) == [("c.png", 0)]


def test_texts_are_files_or_lines(tmp_path: Path) -> None:
    lines = b'{"text": "quick fox"}\n\n{"text": ""}\n{"text": "lazy dog"}\n'
    store, pieces = run(tmp_path, "mails", {"a.txt": b"the quick fox", "b.jsonl": lines})
    places = [(row["source"], row["row"]) for row in read(store, pieces)]
    assert places == [("a.txt", 0), ("b.jsonl", 0), ("b.jsonl", 3)]
    assert list(read_bad(store)) == [("b.jsonl", 2)]


@dataclass(frozen=True)
class Dying(LocalStore):
    """A store whose process is gone at the write number `last`: half of them before, half after."""

    last: int = 0
    writes: tuple[int, ...] = ()

    def count(self, write: Callable[[], str]) -> str:
        made: list[int] = self.__dict__.setdefault("made", [])
        made.append(1)
        if len(made) == self.last and self.last % 2:
            raise KeyboardInterrupt
        etag = write()
        if len(made) == self.last:
            raise KeyboardInterrupt
        return etag

    def write(self, key: str, data: bytes) -> str:
        return self.count(lambda: LocalStore.write(self, key, data))

    def upload(self, key: str, path: Path) -> str:
        return self.count(lambda: LocalStore.upload(self, key, path))


@pytest.fixture
def planned(tmp_path: Path) -> tuple[Plan, Any]:
    store = connect(str(tmp_path / "root"))
    version = publish(store, "people")
    raw = put(tmp_path / "raw", PEOPLE)
    source, plan = make_plan(store, version, make_spec(store.uri, "people", raw))
    return plan, source


@pytest.mark.parametrize("last", range(1, 9))
def test_whatever_write_it_dies_at_each_row_is_there_once_in_the_end(
    planned: tuple[Plan, Any], last: int
) -> None:
    plan, source = planned
    dying = replace(plan, store=Dying(plan.store.uri, last))
    try:
        work(dying, source)
    except KeyboardInterrupt:
        assert len(find_done(plan)) < len(list_units(source)) or last > 6
    pieces = work(plan, source)
    places = [(row["source"], row["row"]) for row in read(plan.store, dict(sorted(pieces.items())))]
    assert places == [("a.csv", 0), ("a.csv", 1), ("a.csv", 4), ("b/c.csv", 0)]
    parts = [entry.key for entry in plan.store.list(plan.prefix)]
    assert len([key for key in parts if key.endswith(".parquet") and ".bad." not in key]) == 3


def test_what_is_done_is_not_done_again(planned: tuple[Plan, Any]) -> None:
    plan, source = planned
    work(plan, source)
    etags = {entry.key: entry.etag for entry in plan.store.list(plan.prefix)}
    work(plan, source)
    assert {entry.key: entry.etag for entry in plan.store.list(plan.prefix)} == etags


def test_a_part_that_is_gone_is_done_again(planned: tuple[Plan, Any]) -> None:
    plan, source = planned
    pieces = work(plan, source)
    plan.store.delete(pieces[0].key)
    assert set(find_done(plan)) == {1, 2}
    assert work(plan, source) == pieces


@pytest.mark.parametrize("left", [0, 10])
def test_a_part_whose_record_is_damaged_is_done_again(planned: tuple[Plan, Any], left: int) -> None:
    plan, source = planned
    pieces = work(plan, source)
    record = f"{plan.prefix}/part-00001.json"
    plan.store.write(record, plan.store.read(record)[:left])
    assert set(find_done(plan)) == {0, 2}
    assert work(plan, source) == pieces


def test_other_objects_go_to_another_place(planned: tuple[Plan, Any], tmp_path: Path) -> None:
    plan, source = planned
    put(tmp_path / "raw", {"a.csv": b"job,age\ncook,1\n"})
    spec = make_spec(plan.store.uri, "people", tmp_path / "raw")
    _, other = make_plan(plan.store, plan.version, spec)
    assert other.prefix != plan.prefix
    with pytest.raises(HeliostatError, match="was changed while it was read"):
        work(plan, source)


def test_too_many_bad_rows_are_a_sentence(planned: tuple[Plan, Any]) -> None:
    plan, source = planned
    pieces = list(work(plan, source).values())
    check_bad(pieces, 0.5, "place")
    with pytest.raises(HeliostatError, match=r"2 of 6 rows cannot be used, such as a.csv, row 2"):
        check_bad(pieces, 0.3, "place")


@pytest.mark.parametrize(
    ("name", "files", "sentence"),
    [
        ("people", {"a.png": b"x"}, "holds images, but people:1 takes csv or parquet"),
        ("people", {"a.csv": b"age\n1\n"}, "has no column job"),
        ("shapes", {"a.csv": CSV}, "holds csv, but shapes:1 takes images or idx"),
        ("sounds", {"a.csv": CSV}, "holds csv, but sounds:1 takes series"),
    ],
)
def test_what_does_not_suit_is_a_sentence(
    tmp_path: Path, name: str, files: dict[str, bytes], sentence: str
) -> None:
    with pytest.raises(HeliostatError, match=sentence):
        run(tmp_path, name, files)


@pytest.mark.cluster
def test_a_run_on_the_cluster_and_the_same_again(
    cluster: Cluster, bucket: str, capfd: pytest.CaptureFixture[str]
) -> None:
    store = connect(bucket)
    publish(store, "people")
    for number in range(5):
        store.write(f"raw/{number}.csv", b"job,age\n" + b"cook,41\n" * (number + 1))
    spec = make_spec(bucket, "people", f"{bucket}/raw")
    place = predict_all(spec)
    manifest = json.loads(connect(place).read("manifest.json"))
    assert (manifest["rows"], manifest["bad"], manifest["version"]) == (15, 0, "people:1")
    assert len(manifest["parts"]) == 5
    assert predict_all(spec) == place
    assert f"already predicted: {place}" in capfd.readouterr().out


@pytest.mark.cluster
@pytest.mark.faults
def test_a_job_that_was_killed_goes_on_where_it_was(
    cluster: Cluster, bucket: str, tmp_path: Path
) -> None:
    store = connect(bucket)
    publish(store, "shapes")
    for number in range(12):
        pixels = np.full((100 + number, 4, 4), number)
        store.write(f"raw/{number}-images-idx3-ubyte", make_idx(pixels))
    path = tmp_path / "shapes.yaml"
    path.write_text(json.dumps(dump(make_spec(bucket, "shapes", f"{bucket}/raw", workers=1))))
    job = Path(__file__).parents[1] / "jobs" / "predict.py"
    killed = subprocess.Popen(
        [sys.executable, str(job), str(path)], stdout=subprocess.PIPE, text=True
    )
    assert killed.stdout
    assert any(line.startswith("part 3 of 12") for line in killed.stdout)
    killed.kill()
    killed.communicate()
    (prefix,) = {entry.key.rpartition("/")[0] for entry in store.list("predictions/")}
    assert store.stat(f"{prefix}/manifest.json") is None
    place = predict_all(make_spec(bucket, "shapes", f"{bucket}/raw", workers=1))
    parts = json.loads(connect(place).read("manifest.json"))["parts"]
    rows = read(store, {part["number"]: Piece(**part) for part in parts})
    assert sorted((row["source"], row["row"]) for row in rows) == sorted(
        (f"{number}-images-idx3-ubyte", row) for number in range(12) for row in range(100 + number)
    )
