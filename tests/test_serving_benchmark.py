"""The benchmark of serving: whoever is measured answers alike, and nobody who fails a request."""

import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from starlette.types import ASGIApp

from heliostat.benchmark.load import Reading, Request, read_report, render
from heliostat.benchmark.peers import fastapi_server
from heliostat.benchmark.questions import Question, ask_binary, ask_fastapi, ask_ours
from heliostat.benchmark.serve import check_answers, compare, take_median
from heliostat.benchmark.servers import find_port, run_server
from heliostat.benchmark.subjects import CLASSES, LENET, MLP, Subject, save_script
from heliostat.data.features import IMAGE
from heliostat.errors import HeliostatError
from heliostat.evaluate import predict
from heliostat.serve.door import Limits
from serving import Client, make_app
from serving import serve as make_served

BASE = "http://server"
LIMITS = Limits(max_body_bytes=2**20, max_requests=4, request_timeout_s=30)


def answer(app: ASGIApp, question: Question) -> list[float]:
    request = question.request
    path = urlsplit(request.url).path
    response = Client(app).post(path, content=request.body, headers=dict(request.headers))
    assert response.status_code == 200
    found: list[float] = question.read(response.content, response.headers).tolist()
    return found


@pytest.mark.parametrize("subject", [MLP, LENET], ids=lambda subject: subject.name)
def test_all_answer_what_the_network_says(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = make_served(subject.name, subject.features, model=subject.model, output=CLASSES)
    expected = predict(served.predictor, {IMAGE: subject.image})[0].tolist()
    ours = make_app({subject.name: served}, LIMITS)
    save_script(subject, tmp_path / "model.pt")
    monkeypatch.setenv(fastapi_server.MODEL, str(tmp_path / "model.pt"))
    theirs = fastapi_server.build()
    for app, question in (
        (ours, ask_ours(BASE, subject, "token")),
        (ours, ask_binary(BASE, subject, "token")),
        (theirs, ask_fastapi(BASE, subject)),
    ):
        assert answer(app, question) == pytest.approx(expected, abs=1e-5)


def test_who_answers_otherwise_is_not_measured() -> None:
    expected = np.array([0.4, 0.6], np.float32)
    check_answers({"one": np.array([0.4, 0.6])}, expected)
    for found in ([0.6, 0.4], [1.0]):
        with pytest.raises(HeliostatError, match="two answers"):
            check_answers({"one": expected, "two": np.array(found)}, expected)


def test_a_server_ends_with_all_that_it_started(
    tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    left_behind = "import time; time.sleep(600)"
    leader = (
        "import http.server, subprocess, sys; port, told = sys.argv[1:];"
        f"child = subprocess.Popen([sys.executable, '-c', {left_behind!r}]);"
        "open(told, 'w').write(str(child.pid));"
        "http.server.HTTPServer(('127.0.0.1', int(port)), "
        "http.server.SimpleHTTPRequestHandler).serve_forever()"
    )
    port, told = find_port(), tmp_path / "pid"
    command = [sys.executable, "-c", leader, str(port), str(told)]
    with run_server(command, f"http://127.0.0.1:{port}/", tmp_path / "log"):
        child = psutil.Process(int(told.read_text()))

    def has_ended() -> bool:
        try:
            return child.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_until(has_ended)


def test_a_report_is_read_unless_a_request_failed() -> None:
    text = (
        'Running\n{"requests": 600, "microseconds": 2000000, "failed": %s, "p50": 900, "p99": 1500}'
    )
    assert read_report(text % 0, BASE) == Reading(300.0, 0.9, 1.5)
    with pytest.raises(HeliostatError, match="failed 2 of 600"):
        read_report(text % 2, BASE)


def test_the_script_sends_what_is_asked(tmp_path: Path) -> None:
    request = Request(BASE, b"", {"authorization": 'Bearer "x"'})
    script = render(request, tmp_path / "body")
    assert 'wrk.headers["authorization"] = "Bearer \\"x\\""' in script
    assert f'io.open("{tmp_path}/body", "rb")' in script


def test_the_median_is_that_of_each_figure() -> None:
    rounds = [Reading(3, 1, 9), Reading(1, 3, 8), Reading(2, 2, 7)]
    assert take_median(rounds) == Reading(2, 2, 8)


def test_a_ratio_is_of_rounds_that_ran_beside_each_other() -> None:
    """The machine is three times as fast in the second round; theirs alone had a good third one."""
    ours = [Reading(speed, 1, 1) for speed in (200, 600, 300)]
    theirs = [Reading(speed, 1, 1) for speed in (100, 300, 300)]
    assert compare(ours, theirs).ratio == 2
    assert compare(ours, theirs).reading.requests_per_second == 300
