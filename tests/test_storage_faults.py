"""What the bucket's store does when the network, the server or the credentials fail."""

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
import pytest

from faultproxy import (
    Fault,
    FaultProxy,
    Plan,
    Request,
    cut,
    first,
    flip,
    flip_request,
    garble,
    lose_answer,
    pretend,
    refuse,
    reset,
    share_of,
    stall,
    stall_midway,
)
from heliostat.errors import HeliostatError
from heliostat.storage import QUICK, Conflict, Missing, Retry, S3Store, connect, probe

MIB = 1024 * 1024
FAST = Retry(
    base_seconds=0.001, cap_seconds=0.01, connect_timeout_seconds=2, read_timeout_seconds=20
)
IMPATIENT = replace(FAST, attempts=3, read_timeout_seconds=0.3)
SLOW_DOWN = refuse(503, "SlowDown")


@pytest.fixture(scope="module")
def endpoint(s3: object) -> str:
    return os.environ["AWS_ENDPOINT_URL"]


@pytest.fixture(scope="module")
def running_proxy(endpoint: str) -> Iterator[FaultProxy]:
    with FaultProxy(endpoint) as proxy:
        proxy.start()
        yield proxy


@pytest.fixture
def proxy(running_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """Stands before the server of `endpoint` and injects nothing yet."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", running_proxy.url)
    running_proxy.inject(lambda request: None)
    return running_proxy


@pytest.fixture
def closed_proxy(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Refuses connections until it is started."""
    with FaultProxy(endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def store(proxy: FaultProxy, bucket: str) -> S3Store:
    return S3Store(bucket, FAST)


@pytest.fixture
def beside(endpoint: str, bucket: str) -> Callable[[str, bytes], None]:
    """Write an object without passing the proxy."""
    client = boto3.Session().client("s3", endpoint_url=endpoint, region_name="us-east-1")
    name, _, prefix = bucket.removeprefix("s3://").partition("/")

    def write(key: str, data: bytes) -> None:
        client.put_object(Bucket=name, Key=f"{prefix}/{key}", Body=data)

    return write


def act(store: S3Store, model: dict[str, bytes], chance: random.Random) -> None:
    """One random operation on the store and on `model`, which must agree."""
    key, data = f"k{chance.randrange(8)}", chance.randbytes(chance.choice([0, 10, 5000, 5000]))
    held = model.get(key)

    def create() -> None:
        if held is None:
            store.create(key, data)
            model[key] = data
        else:
            with pytest.raises(Conflict):
                store.create(key, data)

    def swap() -> None:
        entry = store.stat(key)
        assert (entry is None) == (held is None)
        if entry:
            store.replace(key, data, entry.etag)
            model[key] = data

    def write() -> None:
        store.write(key, data)
        model[key] = data

    def read() -> None:
        if held is None:
            with pytest.raises(Missing):
                store.read(key)
        else:
            assert store.read(key) == held
            assert (
                store.read_range(key, len(held) // 3, len(held) // 3)
                == (held[len(held) // 3 : len(held) // 3 * 2])
            )

    def delete() -> None:
        store.delete(key)
        model.pop(key, None)

    def listing() -> None:
        sizes = {entry.key: entry.size for entry in store.list()}
        assert sizes == {key: len(data) for key, data in model.items()}

    chance.choice([create, swap, write, write, read, read, read, delete, listing])()


FAULTS: dict[str, list[Fault]] = {
    "C1-slow-down": [SLOW_DOWN, refuse(500, "InternalError")],
    "C2-cut-bodies": [cut(0), cut(0.5), cut(0.99)],
    "C3-resets": [reset, garble],
    "C11-lost-answers": [lose_answer],
    "all": [SLOW_DOWN, garble, cut(0), cut(0.5), reset, lose_answer],
}
LONG = [pytest.param(name, 1000, marks=pytest.mark.faults) for name in ("C1-slow-down", "all")]


@pytest.mark.parametrize(("faults", "count"), [*((name, 100) for name in FAULTS), *LONG])
def test_no_operation_fails_or_gives_wrong_bytes(
    store: S3Store, proxy: FaultProxy, faults: str, count: int
) -> None:
    proxy.inject(share_of(0.2, *FAULTS[faults]))
    model: dict[str, bytes] = {}
    chance = random.Random(7)
    for _ in range(count):
        act(store, model, chance)


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_cut_body_is_resumed_where_it_stopped(
    store: S3Store, proxy: FaultProxy, share: float
) -> None:
    data = random.Random(1).randbytes(3 * MIB)
    store.write("key", data)
    headers: list[str] = []

    def twice(request: Request) -> Fault | None:
        headers.append(request.headers.get("Range", "") + request.headers.get("If-Match", ""))
        return cut(share) if request.number < 2 else None

    reads: list[Callable[[], bytes | bytearray]] = [
        lambda: store.read("key"),
        lambda: store.open("key").read(),
        lambda: store.read_range("key", 0, len(data)),
    ]
    for read in reads:
        proxy.inject(twice)
        headers.clear()
        assert read() == data
        assert len(headers) == 3
        assert all('"' in header for header in headers[1:])
        assert f"bytes={int(len(data) * share)}-" in headers[1]


def test_a_body_that_is_cut_for_ever_is_an_error(store: S3Store, proxy: FaultProxy) -> None:
    store.write("key", b"0123456789")
    proxy.inject(lambda request: cut(0))
    with pytest.raises(HeliostatError, match=f"{proxy.url} gave no whole answer"):
        store.read("key")


def test_an_object_that_changes_under_a_cut_read_is_an_error(
    store: S3Store, proxy: FaultProxy, beside: Callable[[str, bytes], None]
) -> None:
    store.write("key", b"old" * 1000)

    def overwrite(request: Request) -> Fault | None:
        if request.number == 1:
            beside("key", b"new" * 1000)
        return cut(0.5) if request.number == 0 else None

    proxy.inject(overwrite)
    with pytest.raises(HeliostatError, match="overwritten while it was read"):
        store.read("key")


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_cut_list_is_asked_for_again(store: S3Store, proxy: FaultProxy, share: float) -> None:
    store.write("key", b"")
    proxy.inject(first(2, cut(share)))
    assert [entry.key for entry in store.list()] == ["key"]
    assert proxy.operations() == ["LIST"] * 3


@pytest.mark.faults
def test_a_list_of_many_pages_survives_faults(store: S3Store, proxy: FaultProxy) -> None:
    keys = [f"{index:05}" for index in range(2500)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: store.write(key, b""), keys))
    proxy.inject(share_of(0.5, SLOW_DOWN, cut(0), cut(0.5), reset))
    for _ in range(5):
        assert [entry.key for entry in store.list()] == keys


def test_bytes_damaged_on_the_way_are_noticed(store: S3Store, proxy: FaultProxy) -> None:
    store.write("key", b"data")
    proxy.inject(first(1, flip))
    with pytest.raises(HeliostatError, match="differ from the checksum"):
        store.read("key")
    proxy.inject(first(1, flip_request))
    store.write("key", b"other")
    assert store.read("key") == b"other"


@dataclass(frozen=True)
class Reviving(Retry):
    """Starts the server before the third repetition."""

    revive: Callable[[], None] = lambda: None

    def pauses(self) -> Iterator[float]:
        for repetition, pause in enumerate(super().pauses()):
            if repetition == 2:
                self.revive()
            yield pause


def test_a_server_that_refuses_and_comes_back_is_waited_for(
    closed_proxy: FaultProxy, bucket: str
) -> None:
    store = S3Store(bucket, Reviving(base_seconds=0.001, revive=closed_proxy.start))
    store.write("key", b"data")
    assert closed_proxy.operations() == ["PUT"]
    assert store.read("key") == b"data"


@pytest.mark.parametrize("fault", [stall, stall_midway])
def test_a_stalled_server_is_given_up_on_and_asked_again(
    store: S3Store, proxy: FaultProxy, fault: Fault
) -> None:
    data = bytes(range(256)) * 100
    store.write("key", data)
    impatient = replace(store, retry=IMPATIENT)
    proxy.inject(first(1, fault))
    assert impatient.read("key") == data
    assert proxy.operations() == ["GET"] * 2
    proxy.inject(lambda request: fault)
    with pytest.raises(HeliostatError, match=f"{proxy.url} gave no whole answer"):
        impatient.read("key")


def test_the_patience_of_the_defaults_is_bounded() -> None:
    assert Retry().connect_timeout_seconds <= 5
    assert Retry().read_timeout_seconds <= 30
    one = QUICK.connect_timeout_seconds + QUICK.read_timeout_seconds
    assert QUICK.attempts * one + sum(QUICK.pauses()) < 12


def unfinished_uploads(endpoint: str, bucket: str) -> list[Any]:
    client = boto3.Session().client("s3", endpoint_url=endpoint, region_name="us-east-1")
    name, _, prefix = bucket.removeprefix("s3://").partition("/")
    answer = client.list_multipart_uploads(Bucket=name, Prefix=prefix)
    return list(answer.get("Uploads", ()))


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    (tmp_path / "big").write_bytes(random.Random(2).randbytes(17 * MIB))
    return tmp_path / "big"


def test_a_file_that_shrinks_while_it_is_uploaded_leaves_no_object(
    store: S3Store, proxy: FaultProxy, big_file: Path, endpoint: str
) -> None:
    def shrink(request: Request) -> Fault | None:
        if request.operation == "START":
            os.truncate(big_file, 16 * MIB + 1)
        return None

    proxy.inject(shrink)
    with pytest.raises(HeliostatError, match="changed while it was uploaded"):
        store.upload("key", big_file)
    assert proxy.operations()[-1] == "ABORT"
    assert store.stat("key") is None
    assert unfinished_uploads(endpoint, store.uri) == []


@pytest.mark.parametrize("operation", ["START", "PART", "COMPLETE"])
def test_a_refused_upload_leaves_no_object(
    store: S3Store, proxy: FaultProxy, big_file: Path, endpoint: str, operation: str
) -> None:
    proxy.inject(first(1, refuse(403, "AccessDenied"), operation))
    with pytest.raises(HeliostatError, match="AccessDenied"):
        store.upload("key", big_file)
    assert store.stat("key") is None
    assert unfinished_uploads(endpoint, store.uri) == []


def test_a_writer_killed_between_parts_leaves_no_object(
    store: S3Store, proxy: FaultProxy, big_file: Path
) -> None:
    reached = threading.Event()

    def hold(request: Request) -> Fault | None:
        if request.operation != "PART" or "partNumber=1&" in request.target:
            return None
        reached.set()
        return stall

    proxy.inject(hold)
    program = (
        "import sys, pathlib; from heliostat.storage import connect; "
        "connect(sys.argv[1]).upload('key', pathlib.Path(sys.argv[2]))"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, store.uri, str(big_file)])
    try:
        assert reached.wait(60)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert store.stat("key") is None
    assert list(store.list()) == []


def test_an_upload_survives_what_passes(store: S3Store, proxy: FaultProxy, big_file: Path) -> None:
    proxy.inject(share_of(0.3, SLOW_DOWN, reset, lose_answer, flip_request, seed=3))
    store.upload("key", big_file)
    proxy.inject(lambda request: None)
    assert store.read("key") == big_file.read_bytes()


def test_an_error_inside_a_200_is_a_failure(
    store: S3Store, proxy: FaultProxy, big_file: Path
) -> None:
    proxy.inject(first(2, refuse(200, "InternalError"), "COMPLETE"))
    store.upload("key", big_file)
    assert proxy.operations().count("COMPLETE") == 3
    proxy.inject(first(99, refuse(200, "InternalError"), "COMPLETE"))
    with pytest.raises(HeliostatError, match="InternalError"):
        store.upload("other", big_file)
    assert store.stat("other") is None


KEYS = ("aws_access_key_id", "aws_secret_access_key")
REFUSALS = {  # code: requests that are sent, what the sentence says
    "ExpiredToken": (2, "have expired"),
    "AccessDenied": (1, "may not do this"),
    "SignatureDoesNotMatch": (1, "AWS_SECRET_ACCESS_KEY"),
    "InvalidAccessKeyId": (1, "AWS_ACCESS_KEY_ID"),
    "RequestTimeTooSkewed": (1, "clock"),
}


@pytest.mark.parametrize("code", REFUSALS)
def test_a_refusal_is_named_and_not_stormed(store: S3Store, proxy: FaultProxy, code: str) -> None:
    requests, words = REFUSALS[code]
    for call in (lambda: store.read("key"), lambda: store.write("key", b""), store.list):
        proxy.inject(lambda request: refuse(403, code))
        with pytest.raises(HeliostatError, match=f"{code}: .*{words}") as caught:
            call()
        assert len(proxy.operations()) == requests
        assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)


def test_a_refused_stat_is_an_error_and_not_an_absence(store: S3Store, proxy: FaultProxy) -> None:
    proxy.inject(lambda request: refuse(403, "AccessDenied"))
    with pytest.raises(HeliostatError, match="credentials are right"):
        store.stat("key")
    assert len(proxy.operations()) == 2


def test_credentials_that_were_renewed_are_picked_up(
    store: S3Store, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("key", b"data")
    profile = tmp_path / "credentials"
    lines = [f"{name} = {os.environ[name.upper()]}" for name in KEYS]
    profile.write_text("[default]\naws_access_key_id = OLD\naws_secret_access_key = OLD\n")
    for name in KEYS:
        monkeypatch.delenv(name.upper())
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))

    def renew(request: Request) -> Fault | None:
        if request.number:
            return None
        profile.write_text("\n".join(["[default]", *lines]))
        return refuse(403, "ExpiredToken")

    proxy.inject(renew)
    assert store.read("key") == b"data"
    assert proxy.operations() == ["GET", "GET"]


def test_a_probe_names_an_endpoint_that_is_down(closed_proxy: FaultProxy, bucket: str) -> None:
    with pytest.raises(HeliostatError, match=f"{closed_proxy.url} gave no whole answer"):
        probe(connect(bucket))


def test_a_probe_names_an_endpoint_that_has_no_address(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:pass@no-such-host.invalid:9000")
    with pytest.raises(HeliostatError, match=r"http://no-such-host\.invalid:9000 gave"):
        probe(connect(bucket))


def test_a_probe_names_an_endpoint_that_is_no_url(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1")
    with pytest.raises(HeliostatError, match="AWS_ENDPOINT_URL is no URL"):
        probe(connect(bucket))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"AWS_ACCESS_KEY_ID": "UNKNOWN"}, "InvalidAccessKeyId"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, "SignatureDoesNotMatch"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no credentials were found"),
        ({"AWS_PROFILE": "no-such-profile"}, "correct AWS_PROFILE"),
    ],
)
def test_a_probe_names_wrong_credentials(
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str],
    words: str,
) -> None:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(HeliostatError, match=words) as caught:
        probe(connect(bucket))
    assert "wrong-secret" not in str(caught.value)


def test_a_probe_names_a_missing_bucket_and_does_not_make_it(s3: object) -> None:
    for _ in range(2):
        with pytest.raises(HeliostatError, match=r"NoSuchBucket: .*aws s3 mb"):
            probe(connect("s3://no-such-bucket-here/prefix"))


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (first(99, refuse(403, "AccessDenied"), "PUT"), "cannot put .*AccessDenied"),
        (first(99, refuse(403, "AccessDenied"), "GET"), "cannot get .*AccessDenied"),
        (first(99, refuse(403, "AccessDenied"), "DELETE"), "cannot delete .*AccessDenied"),
        (first(99, refuse(301, "PermanentRedirect"), "LIST"), "PermanentRedirect: .*AWS_REGION"),
        (lambda request: pretend if request.number == 3 else None, "ignores conditional writes"),
    ],
    ids=["read-only", "write-only", "no-delete", "region", "no-conditions"],
)
def test_a_probe_names_what_is_not_allowed(
    store: S3Store, proxy: FaultProxy, plan: Plan, words: str
) -> None:
    proxy.inject(plan)
    with pytest.raises(HeliostatError, match=words):
        probe(store)


def test_a_write_whose_answer_was_lost_has_happened_once(
    store: S3Store, proxy: FaultProxy, big_file: Path
) -> None:
    proxy.inject(first(1, lose_answer))
    etag = store.create("key", b"mine")
    assert proxy.operations() == ["PUT", "PUT", "HEAD"]
    proxy.inject(first(1, lose_answer))
    store.replace("key", b"still mine", etag)
    assert store.read("key") == b"still mine"
    proxy.inject(first(1, lose_answer, "COMPLETE"))
    store.upload("big", big_file)
    assert store.stat("big")


def test_equal_bytes_of_another_writer_are_not_ours(
    store: S3Store, proxy: FaultProxy, beside: Callable[[str, bytes], None]
) -> None:
    def overtake(request: Request) -> Fault | None:
        if request.number:
            return None
        beside("key", b"claim")
        return reset

    proxy.inject(overtake)
    with pytest.raises(Conflict):
        store.create("key", b"claim")


def test_of_racing_creators_with_lost_answers_exactly_one_wins(
    store: S3Store, proxy: FaultProxy
) -> None:
    proxy.inject(share_of(0.4, lose_answer, reset, SLOW_DOWN))

    def claim(index: int) -> int | None:
        try:
            store.create("claim", b"equal bytes")
        except Conflict:
            return None
        return index

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(claim, range(16)))
    assert sum(outcome is not None for outcome in outcomes) == 1


def test_a_conflict_of_conditional_requests_is_asked_again(
    store: S3Store, proxy: FaultProxy
) -> None:
    proxy.inject(first(2, refuse(409, "ConditionalRequestConflict")))
    store.create("key", b"")
    assert proxy.operations() == ["PUT"] * 3
    proxy.inject(lambda request: refuse(409, "ConditionalRequestConflict"))
    with pytest.raises(HeliostatError, match="try again later"):
        store.create("other", b"")
