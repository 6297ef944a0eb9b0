"""The laws of a store, each stated once and held by a real S3 server and by a local directory."""

import os
import pickle
import re
import stat
import traceback
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heliostat.errors import HeliostatError
from heliostat.storage import (
    Conflict,
    Entry,
    LocalStore,
    Missing,
    Retry,
    Store,
    connect,
    join,
    probe,
    upload_folder,
)

MIB = 1024 * 1024
ODD_KEYS = [
    "plain",
    "a b",
    "a+b",
    "a%20b",
    "a%2Fb",
    "100%",
    "ü/é/日本.txt",
    "a&b=c?d#e",
    "~'\"[x]{y}|^`<>",
    "deep/" * 20 + "end",
    "...",
    ".hidden/x",
    "trailing ",
    "line\nbreak",
]


@pytest.fixture(params=["s3", "local"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("bucket"))
    return str(tmp_path / "store")


@pytest.fixture
def store(uri: str) -> Store:
    return connect(uri)


def race(count: int, act: Callable[[int], Any]) -> list[Any]:
    """What `act` returned or raised (Conflict only) in each of `count` threads at once."""

    def attempt(index: int) -> Any:
        try:
            return act(index)
        except Conflict as conflict:
            return conflict

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(attempt, range(count)))


@pytest.mark.parametrize("size", [0, 1, 1000, 3 * MIB + 1])
def test_what_is_written_is_read(store: Store, size: int) -> None:
    data = os.urandom(size)
    etag = store.write("some/key", data)
    assert store.read("some/key") == data
    assert store.stat("some/key") == Entry("some/key", size, etag)
    assert list(store.list()) == [Entry("some/key", size, etag)]
    with store.open("some/key") as stream:
        assert stream.read(10) + stream.read() == data


def test_a_write_overwrites_and_changes_the_etag(store: Store) -> None:
    before = store.write("key", b"first")
    after = store.write("key", b"later")
    assert before != after
    assert store.read("key") == b"later"


def test_no_two_states_of_a_local_object_share_an_etag(tmp_path: Path) -> None:
    store = connect(str(tmp_path))
    etags = set()
    for _ in range(200):
        etags.add(store.write("key", b"same size"))
        store.delete("key")
    assert len(etags) == 200


def test_a_local_edit_that_keeps_the_size_changes_the_etag(tmp_path: Path) -> None:
    store = connect(str(tmp_path))
    etag = store.write("key", b"before")
    (tmp_path / "key").write_bytes(b"after!")
    assert [entry.etag for entry in store.list()] != [etag]


def test_a_file_of_many_parts_is_uploaded_whole(store: Store, tmp_path: Path) -> None:
    data = os.urandom(MIB) * 33 + b"end"
    (tmp_path / "file").write_bytes(data)
    etag = store.upload("big", tmp_path / "file")
    assert store.read("big") == data
    assert store.stat("big") == Entry("big", len(data), etag)


def test_a_stream_needs_little_memory(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(24 * MIB))
    store.upload("big", tmp_path / "file")
    store.stat("big")  # whatever the first request of a process loads is no part of the stream
    tracemalloc.start()
    with store.open("big") as stream:
        total = sum(iter(lambda: len(stream.read(MIB)), 0))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 24 * MIB
    assert peak_bytes < 10 * MIB


def test_a_failed_upload_leaves_what_was_there(store: Store, tmp_path: Path) -> None:
    store.write("taken", b"old")
    for key in ("taken", "new"):
        with pytest.raises(OSError, match="absent"):
            store.upload(key, tmp_path / "absent")
    assert store.read("taken") == b"old"
    assert [entry.key for entry in store.list()] == ["taken"]


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 100), (0, 1), (99, 1), (40, 20), (0, 0), (100, 0)]
)
def test_a_range_has_exactly_its_bytes(store: Store, offset: int, length: int) -> None:
    data = bytes(range(100))
    store.write("key", data)
    assert store.read_range("key", offset, length) == data[offset : offset + length]


@pytest.mark.parametrize(("offset", "length"), [(0, 101), (99, 2), (100, 1), (1000, 1)])
def test_a_range_beyond_the_end_is_an_error(store: Store, offset: int, length: int) -> None:
    store.write("key", bytes(100))
    with pytest.raises(HeliostatError, match="ends before"):
        store.read_range("key", offset, length)


def test_what_is_missing_is_said_to_be(store: Store) -> None:
    readers: list[Callable[[str], object]] = [
        store.read,
        store.open,
        lambda key: store.read_range(key, 0, 1),
    ]
    for read in readers:
        with pytest.raises(Missing, match=f"{store.uri}/no/such"):
            read("no/such")
    assert store.stat("no/such") is None
    assert list(store.list("no/")) == []


def test_delete_may_be_repeated(store: Store) -> None:
    store.write("a/b", b"")
    for _ in range(2):
        store.delete("a/b")
        assert store.stat("a/b") is None
    store.delete("never/there")


def test_a_key_is_created_once(store: Store) -> None:
    store.create("key", b"first")
    with pytest.raises(Conflict):
        store.create("key", b"second")
    with pytest.raises(Conflict):
        store.create("key", b"first")
    assert store.read("key") == b"first"


@pytest.mark.parametrize(
    ("count", "same"), [(16, True), (50, False)], ids=["16-same-bytes", "50-own-bytes"]
)
def test_of_racing_creators_exactly_one_wins(store: Store, count: int, same: bool) -> None:
    bodies = [b"claim" if same else f"claim {index}".encode() for index in range(count)]
    outcomes = race(count, lambda index: store.create("claim", bodies[index]))
    winners = [index for index in range(count) if not isinstance(outcomes[index], Conflict)]
    assert len(winners) == 1
    assert store.read("claim") == bodies[winners[0]]


def test_replace_needs_the_present_etag(store: Store) -> None:
    stale = store.write("key", b"one")
    fresh = store.replace("key", b"two", stale)
    for etag in (stale, "0" * 32):
        with pytest.raises(Conflict):
            store.replace("key", b"three", etag)
    with pytest.raises(Conflict):
        store.replace("absent", b"", fresh)
    assert store.read("key") == b"two"
    assert store.stat("absent") is None
    store.replace("key", b"three", fresh)


@pytest.mark.parametrize("count", [16, pytest.param(50, marks=pytest.mark.faults)])
def test_no_update_of_racing_writers_is_lost(store: Store, count: int) -> None:
    store.write("counter", b"0")

    def increment(_: int) -> None:
        while True:
            entry = store.stat("counter")
            assert entry
            try:
                store.replace("counter", b"%d" % (int(store.read("counter")) + 1), entry.etag)
                return
            except Conflict:
                continue

    race(count, increment)
    assert int(store.read("counter")) == count


@pytest.mark.parametrize("count", [1050, pytest.param(2500, marks=pytest.mark.faults)])
def test_a_list_of_many_pages_is_complete_and_sorted(store: Store, count: int) -> None:
    keys = [f"{index % 7}/{index:05}" for index in range(count)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: store.write(key, key.encode()), keys))
    assert [entry.key for entry in store.list()] == sorted(keys)
    assert [entry.key for entry in store.list("3/")] == sorted(k for k in keys if k[0] == "3")
    assert {entry.size for entry in store.list()} == {7}


def test_a_list_is_sorted_by_the_whole_key(store: Store) -> None:
    keys = ["a/b/c", "a-b", "a.b", "a/b", "a0", "ab", "A", "a/b.c"]
    keys.remove("a/b")  # a directory cannot be an object as well
    for key in keys:
        store.write(key, b"")
    assert [entry.key for entry in store.list()] == sorted(keys)
    assert [entry.key for entry in store.list("a/b")] == ["a/b.c", "a/b/c"]


def test_a_store_sees_nothing_beside_its_uri(uri: str) -> None:
    for name in ("a", "ab", "b"):
        connect(f"{uri}/runs/{name}").write("x/y", name.encode())
    inner = connect(f"{uri}/runs/a/")
    assert [entry.key for entry in inner.list()] == ["x/y"]
    assert inner.read("x/y") == b"a"
    outer = connect(uri)
    assert [entry.key for entry in outer.list("runs/a")] == ["runs/a/x/y", "runs/ab/x/y"]


@pytest.mark.parametrize("key", ODD_KEYS)
def test_odd_keys_round_trip(store: Store, key: str) -> None:
    store.write(key, b"1")
    assert [entry.key for entry in store.list()] == [key]
    assert [entry.key for entry in store.list(key[:2])] == [key]
    assert store.read(key) == b"1"
    store.delete(key)
    assert list(store.list()) == []


@pytest.mark.parametrize(
    "key",
    ["", "/a", "a/", "a//b", "../a", "a/../b", "..", ".", "a/./b", "a\0b", "a\\b", "a\ud800"],
)
def test_unsafe_keys_are_refused_for_writing(store: Store, tmp_path: Path, key: str) -> None:
    (tmp_path / "file").write_bytes(b"1")
    writers: list[Callable[[], object]] = [
        lambda: store.write(key, b""),
        lambda: store.create(key, b""),
        lambda: store.replace(key, b"", "etag"),
        lambda: store.upload(key, tmp_path / "file"),
    ]
    for write in writers:
        with pytest.raises(HeliostatError, match="is not a key"):
            write()
    assert list(store.list()) == []


def test_a_refused_key_is_named_short_and_escaped(store: Store) -> None:
    with pytest.raises(HeliostatError) as caught:
        store.write("\n\x1b[31m" + "x" * 5000 + "/", b"")
    assert "'\\n\\x1b[31mxxx" in str(caught.value)
    assert len(str(caught.value)) < 400


SEGMENTS = st.text(
    st.characters(codec="utf-8", exclude_characters="/\\\0"), min_size=1, max_size=20
).filter(lambda text: text not in (".", ".."))


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(key=st.lists(SEGMENTS, min_size=1, max_size=4).map("/".join), data=st.binary(max_size=50))
def test_any_safe_key_round_trips(store: Store, key: str, data: bytes) -> None:
    fresh = connect(f"{store.uri}/{uuid4()}")  # a directory that is left cannot be an object later
    etag = fresh.write(key, data)
    assert fresh.read(key) == data
    assert list(fresh.list()) == [Entry(key, len(data), etag)]
    fresh.delete(key)
    assert list(fresh.list()) == []


def test_a_store_travels_without_credentials(store: Store) -> None:
    store.write("key", b"data")
    parcel = pickle.dumps(store)
    assert pickle.loads(parcel) == store  # noqa: S301
    assert pickle.loads(parcel).read("key") == b"data"  # noqa: S301
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "-").encode() not in parcel


def test_a_probe_leaves_nothing_behind(store: Store) -> None:
    probe(store)
    assert list(store.list()) == []


@pytest.mark.parametrize(
    ("uri", "normal"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("S3://bucket/a/b/", "s3://bucket/a/b"),
        ("file:///some/where", "/some/where"),
        ("/some/where/", "/some/where"),
        ("/some/../where", "/where"),
        ("some/where", f"{os.getcwd()}/some/where"),
        ("./odd:name", f"{os.getcwd()}/odd:name"),
    ],
)
def test_a_place_has_one_spelling(uri: str, normal: str) -> None:
    assert connect(uri).uri == normal


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "http://169.254.169.254/latest",
        "https://bucket.s3.amazonaws.com/key",
        "gs://bucket",
        "s3:bucket",
        "s3:/bucket",
        "s3://",
        "s3:///key",
        "s3://b",
        "s3://bucket//key",
        "s3://bucket/../other",
        "s3://bucket\0",
        "file://host/path",
        "/some\0where",
    ],
)
def test_other_places_are_refused_unseen(uri: str) -> None:
    with pytest.raises(HeliostatError, match=r"s3://bucket/prefix|is not a key"):
        connect(uri)


@pytest.mark.parametrize("secret", ["sEcReT", "sEc/ReT", "sE@cReT", "SeC:ReT/xYz@QqQ"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(secret: str) -> None:
    with pytest.raises(HeliostatError, match="profile") as caught:
        connect(f"s3://AKIA:{secret}@bucket/key")
    for part in ("AKIA", *re.split("[/@:]", secret)):
        assert part not in str(caught.value)


def test_an_endpoint_that_is_no_url_is_refused_and_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "user:hunter2@host")
    with pytest.raises(HeliostatError, match="write them like") as caught:
        connect("s3://bucket").read("key")
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_file_that_cannot_be_uploaded_is_named(tmp_path: Path) -> None:
    class Slow(LocalStore):
        """A store that is so slow that a file vanishes before it is read."""

        def upload(self, key: str, path: Path) -> str:
            path.unlink()
            return super().upload(key, path)

    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.png").write_bytes(b"")
    with pytest.raises(HeliostatError, match=r"cannot read .*raw/a\.png: No such file"):
        upload_folder(tmp_path / "raw", Slow(str(tmp_path / "store")), print)


def test_join_drops_empty_parts() -> None:
    assert join("models", "", "x", "1.json") == "models/x/1.json"
    assert join() == ""


def test_the_defaults_outlast_thirty_seconds() -> None:
    assert Retry().attempts >= 8
    assert all(sum(Retry().pauses()) > 30 for _ in range(1000))
    assert len({next(Retry().pauses()) for _ in range(10)}) > 1


def test_local_objects_are_private(tmp_path: Path) -> None:
    store = connect(str(tmp_path / "store"))
    store.write("a/b", b"")
    store.create("a/c", b"")
    modes = {
        path.relative_to(tmp_path).as_posix(): stat.S_IMODE(path.stat().st_mode)
        for path in tmp_path.rglob("*")
    }
    assert {modes["store"], modes["store/a"]} == {0o700}
    assert {mode for name, mode in modes.items() if name.startswith("store/a/")} == {0o600}


def test_what_a_killed_local_writer_leaves_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".heliostat-local-abc").write_bytes(b"half")
    store = connect(str(tmp_path))
    assert list(store.list()) == []
    with pytest.raises(HeliostatError, match="is not a key"):
        store.write(".heliostat-local-abc", b"")


@pytest.mark.parametrize("key", ["../secret", "/etc/passwd", "a/../../secret", "a\0"])
def test_local_reads_stay_inside(tmp_path: Path, key: str) -> None:
    (tmp_path / "secret").write_bytes(b"")
    (tmp_path / "store" / "a").mkdir(parents=True)
    with pytest.raises(Missing):
        connect(str(tmp_path / "store")).read(key)


def test_a_probe_says_that_a_directory_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(HeliostatError, match=r"Not a directory: choose a directory"):
            probe(connect(str(place)))


def test_a_link_to_itself_is_an_error_and_not_an_endless_list(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(HeliostatError, match="symbolic link"):
        list(connect(str(tmp_path)).list())


def test_local_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_bytes(b"1")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "data").symlink_to(tmp_path / "elsewhere")
    assert [entry.key for entry in connect(str(tmp_path / "store")).list()] == ["data/x"]
