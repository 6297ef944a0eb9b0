"""What is understood of what clouds say, from servers that ask for what theirs do and fail."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from heliostat.cluster import notice
from heliostat.cluster.notice import Aws, File, Gcp, Notice, Unheard, choose_source
from heliostat.errors import HeliostatError
from metadata import ACTION, ADVICE, MAINTENANCE, PREEMPTED, Metadata, serve_metadata

NOON = "2027-01-31T12:00:00Z"
NOON_SECONDS = 1_801_396_800.0


@pytest.fixture
def aws() -> Iterator[Metadata]:
    with serve_metadata({}) as metadata:
        yield metadata


@pytest.fixture
def gcp() -> Iterator[Metadata]:
    with serve_metadata({PREEMPTED: "FALSE", MAINTENANCE: "NONE"}) as metadata:
        yield metadata


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_aws_says_what_it_will_do_and_when(aws: Metadata, action: str) -> None:
    source = Aws(aws.url)
    assert source.listen() is None
    aws.said[ADVICE] = json.dumps({"noticeTime": NOON})
    feared = source.listen()
    assert feared is not None
    assert feared.at is None
    aws.said[ACTION] = json.dumps({"action": action, "time": NOON})
    assert source.listen() == Notice(f"AWS will {action} this machine", NOON_SECONDS)
    assert aws.asked.count("PUT /latest/api/token") == 1


def test_an_expired_token_of_aws_is_replaced(aws: Metadata) -> None:
    source = Aws(aws.url)
    assert source.listen() is None
    aws.tokens.clear()
    assert source.listen() is None
    assert aws.asked.count("PUT /latest/api/token") == 2


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("<html>log in</html>", "no JSON object"),
        ('["terminate"]', "no JSON object"),
        ('{"time": "2027-01-31T12:00:00Z"}', "without an action"),
        ('{"action": "sing", "time": "2027-01-31T12:00:00Z"}', "without an action"),
        ('{"action": "stop"}', "is no time"),
        ('{"action": "stop", "time": "soon"}', "is no time"),
        ("", "no JSON object"),
    ],
)
def test_what_aws_never_says_is_no_notice(aws: Metadata, said: str, told: str) -> None:
    aws.said[ACTION] = said
    with pytest.raises(Unheard, match=told):
        Aws(aws.url).listen()


@pytest.mark.parametrize("status", [302, 403, 429, 500, 503])
def test_a_server_in_trouble_says_nothing(aws: Metadata, gcp: Metadata, status: int) -> None:
    sources = (Aws(aws.url), Aws(aws.url), Gcp(gcp.url))
    assert sources[0].listen() is None  # has a token
    aws.status = gcp.status = status
    for source in sources:
        with pytest.raises(Unheard, match=f"answers {status}"):
            source.listen()


def test_a_server_that_hangs_or_is_away_is_given_up(
    aws: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notice, "TIMEOUT_SECONDS", 0.2)
    aws.hangs = True
    with pytest.raises(Unheard, match="does not answer: timed out"):
        Aws(aws.url).listen()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(Unheard, match="does not answer"):
            Aws(f"http://127.0.0.1:{taken.getsockname()[1]}").listen()


def test_no_proxy_hears_of_it(aws: Metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert Aws(aws.url).listen() is None


@pytest.mark.parametrize(
    ("path", "said", "seconds"),
    [
        (PREEMPTED, "TRUE", 30),
        (PREEMPTED, "TRUE\n", 30),
        (MAINTENANCE, "TERMINATE_ON_HOST_MAINTENANCE", 60),
        (MAINTENANCE, "MIGRATE_ON_HOST_MAINTENANCE", None),
    ],
)
def test_gcp_says_that_an_end_has_begun(
    gcp: Metadata, path: str, said: str, seconds: float | None
) -> None:
    now = 1000.0
    source = Gcp(gcp.url, clock=lambda: now)
    assert source.listen() is None
    gcp.said[path] = said
    first = source.listen()
    assert (first and first.at) == (seconds and 1000 + seconds)
    now = 1010.0
    assert source.listen() == first
    gcp.said[path] = "FALSE" if path == PREEMPTED else "NONE"
    assert source.listen() is None
    gcp.said[path] = said
    second = source.listen()
    assert (second and second.at) == (seconds and 1010 + seconds)


def test_what_gcp_never_says_is_no_notice(gcp: Metadata) -> None:
    gcp.said[PREEMPTED] = "PERHAPS"
    with pytest.raises(Unheard, match="preempted is 'PERHAPS', not one of FALSE, TRUE"):
        Gcp(gcp.url).listen()


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("", 5000),
        ('{"seconds": 60}', 5060),
        ('{"seconds": -3}', 5000),
        (f'{{"time": "{NOON}"}}', NOON_SECONDS),
        ('{"time": "2027-01-31T13:00:00+01:00"}', NOON_SECONDS),
        ('{"time": "2027-01-31 12:00:00"}', NOON_SECONDS),
    ],
)
def test_a_file_says_when(tmp_path: Path, text: str, at: float) -> None:
    path = tmp_path / "leaving"
    source = File(path, clock=lambda: 5100)
    assert source.listen() is None
    path.write_text(text)
    os.utime(path, (5000, 5000))
    said = source.listen()
    assert said is not None
    assert said.at == at


@pytest.mark.parametrize("text", ["soon", "[]", "{}", '{"seconds": true}', '{"seconds": "60"}'])
def test_a_file_that_is_not_understood_is_no_notice(tmp_path: Path, text: str) -> None:
    path = tmp_path / "leaving"
    path.write_text(text)
    with pytest.raises(Unheard):
        File(path).listen()
    with pytest.raises(Unheard, match="cannot be read"):
        File(tmp_path).listen()


def test_a_file_that_was_only_just_made_may_yet_be_written_into(tmp_path: Path) -> None:
    path = tmp_path / "leaving"
    path.touch()
    os.utime(path, (5000, 5000))
    assert File(path, clock=lambda: 5000.5).listen() is None
    assert File(path, clock=lambda: 5001.5).listen() is not None


def test_auto_is_the_cloud_that_answers(aws: Metadata, gcp: Metadata) -> None:
    assert choose_source("auto", aws.url).name == "AWS"
    assert choose_source("auto", gcp.url).name == "GCP"


def test_auto_where_no_cloud_answers_says_so(
    aws: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notice, "AUTO_SECONDS", 0)
    aws.status = 500
    with pytest.raises(HeliostatError, match=r"no cloud answers here.*token answers 500"):
        choose_source("auto", aws.url, pause=lambda seconds: None)


@pytest.mark.parametrize(
    ("text", "url", "told"),
    [
        ("azure", None, "--source azure is no source of notices: use aws, gcp, file:PATH"),
        ("file:", None, "is no source"),
        ("file:/x", "http://127.0.0.1:1", "without --metadata-url"),
        ("aws", "https://127.0.0.1", "is no http://HOST:PORT"),
        ("aws", "127.0.0.1:80", "is no http://HOST:PORT"),
    ],
)
def test_what_is_no_source_is_refused(text: str, url: str | None, told: str) -> None:
    with pytest.raises(HeliostatError, match=told):
        choose_source(text, url)
