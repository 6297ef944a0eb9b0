"""Laws of the edge, on a real HAProxy before real code of replicas: what is bad stays outside."""

import concurrent.futures
import json
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h2.connection
import h2.events
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.http import InferenceServerClient
from tritonclient.http._utils import _raise_if_error
from tritonclient.utils import InferenceServerException

from edging import GOOD, Upstream, exchange, pick_port, read_all, run_edge, status_of
from heliostat.edge import CONTROL_HEADERS, ERRORS, Edge, Limits, render
from heliostat.errors import HeliostatError
from heliostat.local import edge as local_edge
from heliostat.local import processes
from heliostat.serve.replies import ERROR_TYPES
from serving import LIMITS as REPLICA_LIMITS
from serving import MODELS, ROWS, check_error, make_app

LIMITS = Limits(
    max_body_bytes=100_000,
    small_body_bytes=10_000,
    header_timeout_s=1,
    body_timeout_s=1,
    max_uploads=40,
    max_connections_per_source=200,
)
PREDICT = "/v1/models/people:predict"

WaitUntil = Callable[..., None]


@contextmanager
def serve(directory: Path, **changes: object) -> Iterator[tuple[Edge, Upstream, str]]:
    """An edge with some settings of its own, its upstream and the marker of its processes."""
    upstream = Upstream(make_app(MODELS, REPLICA_LIMITS), pick_port())
    edge = replace(Edge(pick_port(), upstream.port, limits=LIMITS), **changes)  # type: ignore[arg-type]
    with upstream.run(), run_edge(edge, directory) as marker:
        yield edge, upstream, marker


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Edge, Upstream, str]]:
    with serve(tmp_path_factory.mktemp("edge")) as parts:
        yield parts


@pytest.fixture
def upstream(served: tuple[Edge, Upstream, str]) -> Upstream:
    served[1].seen.clear()
    return served[1]


@pytest.fixture
def port(served: tuple[Edge, Upstream, str], upstream: Upstream) -> int:
    return served[0].port


@pytest.fixture
def client(served: tuple[Edge, Upstream, str], upstream: Upstream) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served[0].url, timeout=30) as client:
        yield client


def make_certificate(directory: Path) -> Path:
    """A self-signed certificate of 127.0.0.1 with its key, in a folder with a name to quote."""
    folder = directory / "it's $HOME"
    folder.mkdir()
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-keyout", "key", "-out", "chain", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    path = folder / "edge.pem"
    path.write_text((folder / "chain").read_text() + (folder / "key").read_text())
    return path


# The text.


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"host": "0.0.0.0"},
        {"host": "::"},
        {"spare_port": 1},
        {"limits": Limits(*[1] * 13)},
        {"limits": replace(LIMITS, max_body_bytes=2**27)},
    ],
)
def test_haproxy_accepts_every_configuration(tmp_path: Path, changes: dict[str, object]) -> None:
    edge = replace(Edge(pick_port(), pick_port()), **changes)  # type: ignore[arg-type]
    command = local_edge.prepare(edge, tmp_path / "edge.cfg")
    said = subprocess.run(
        [command[4], "-c", "-f", tmp_path / "edge.cfg"], capture_output=True, text=True, check=True
    )
    assert "WARNING" not in said.stderr


def test_the_configuration_is_a_pure_function_and_logs_nothing() -> None:
    edge = Edge(8080, 8000)
    assert render(edge) == render(Edge(8080, 8000))
    assert not any(line.split()[:1] == ["log"] for line in render(edge).splitlines())


def test_both_name_the_kinds_of_errors_alike() -> None:
    for status in ERROR_TYPES.keys() & ERRORS.keys():
        assert ERRORS[status][0] == ERROR_TYPES[status]


def test_a_certificate_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "edge.pem").write_text("x")
    edge = Edge(pick_port(), pick_port(), certificate=str(tmp_path / "edge.pem"))
    with pytest.raises(HeliostatError, match=r"edge\.pem"):
        local_edge.prepare(edge, tmp_path / "edge.cfg")


# Good requests.


def test_a_good_request_is_answered_as_without_an_edge(
    client: httpx.Client, upstream: Upstream
) -> None:
    direct = httpx.post(f"http://127.0.0.1:{upstream.port}{PREDICT}", json=ROWS)
    assert client.post(PREDICT, json=ROWS).json() == direct.json()
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.head("/healthz").status_code in (200, 405)


@pytest.mark.parametrize("size", [0, 1, 9_999, 10_001, 99_999, 100_000])
def test_a_body_up_to_the_limit_arrives_whole(client: httpx.Client, size: int) -> None:
    assert client.post("/v1/echo", content=b"x" * size).json()["body_bytes"] == size
    pieces = iter([b"x" * (size // 2), b"x" * (size - size // 2)])
    assert client.post("/v1/echo", content=pieces).json()["body_bytes"] == size


def test_a_request_has_one_id_that_the_edge_made(client: httpx.Client) -> None:
    ids = set()
    for path in ("/v1/echo", "/v1/models", "/v1/nothing", "/nothing"):
        answer = client.get(path, headers={"x-request-id": "mine"})
        (found,) = answer.headers.get_list("x-request-id")
        assert len(bytes.fromhex(found)) == 16
        if answer.is_error:
            assert check_error(answer)["request_id"] == found
        elif path == "/v1/echo":
            assert answer.json()["headers"]["x-request-id"] == found
        ids.add(found)
    assert len(ids) == 4


def test_a_client_learns_nothing_of_what_stands_behind(client: httpx.Client) -> None:
    assert "server" not in client.get("/v1/models").headers


# What is taken out of a request.


@pytest.mark.parametrize(
    "name",
    [
        "x-request-timeout-seconds",
        "x-request-disconnect-disabled",
        "X-Request-Timeout-Seconds",
        "x_request_timeout_seconds",
        "serve_multiplexed_model_id",
        "serve-multiplexed-model-id",
        "x-session-id",
        "x_session_id",
        "x-serve-router-replica",
        "x-forwarded-host",
        "x-real-ip",
        "http2-settings",
    ],
)
def test_what_serve_obeys_is_removed(client: httpx.Client, upstream: Upstream, name: str) -> None:
    kept = {"authorization": "Bearer x", "x-timeout-seconds": "3", "accept": "a/b"}
    assert client.get("/v1/echo", headers={name: "0", **kept}).status_code == 200
    (seen,) = upstream.seen
    assert name.lower() not in seen
    assert seen.items() >= kept.items()


def test_every_header_that_serve_reads_is_known_to_the_edge() -> None:
    from ray.serve._private import constants

    read = {
        value
        for name, value in vars(constants).items()
        if name.endswith(("_HEADER", "_HEADER_PREFIX", "SERVE_SESSION_ID", "_MULTIPLEXED_MODEL_ID"))
        and isinstance(value, str)
    }
    assert len(read) >= 5
    for name in read:
        assert "_" in name or name.startswith(CONTROL_HEADERS), name


def test_an_address_is_the_edges_word(client: httpx.Client, upstream: Upstream) -> None:
    client.get("/v1/echo", headers={"x-forwarded-for": "8.8.8.8", "host": "elsewhere:1"})
    (seen,) = upstream.seen
    assert seen["x-forwarded-for"] == "127.0.0.1"
    assert seen["host"] == "heliostat"
    assert seen[":url"] == "http://heliostat/v1/echo"


def test_a_request_id_of_any_bytes_is_harmless(port: int, upstream: Upstream) -> None:
    for value in (b"\xff", b"\x1b[31m", b"http://169.254.169.254/", b"x" * 4000):
        head = b"GET /v1/echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        assert status_of(exchange(port, head + b"x-request-id: " + value + b"\r\n\r\n")) == 200
        assert len(bytes.fromhex(upstream.seen.pop()["x-request-id"])) == 16


def test_an_offer_to_speak_http2_is_passed_over(port: int) -> None:
    """As Java's client makes it on its first request."""
    offer = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEA\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n" + offer + b"\r\n")
        assert status_of(client.recv(65536)) == 200


# Bodies.


def post(*headers: str, path: str = PREDICT) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "host: x", *headers, "", ""]).encode()


@pytest.mark.parametrize("declared", ["100001", "60000000", str(2**32 + 1), str(2**62)])
def test_a_large_body_is_refused_before_it_is_sent(port: int, declared: str) -> None:
    answer = exchange(port, post(f"content-length: {declared}", "connection: close"))
    assert status_of(answer) == 413
    assert b"100,000 bytes" in answer


def test_an_endless_body_without_length_is_refused(port: int) -> None:
    chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    head = post("transfer-encoding: chunked", path="/v1/echo")
    assert status_of(exchange(port, head, *[chunk] * 60)) == 413


def test_a_sent_body_that_is_too_large_is_answered_so(client: httpx.Client) -> None:
    for content in (b"x" * 150_000, iter([b"x" * 75_000] * 2)):
        answer = client.post(PREDICT, content=content)
        assert answer.status_code == 413
        assert check_error(answer)["type"] == "body_too_large"


@pytest.mark.parametrize(
    "head",
    [
        post("content-length: 9", "content-type: application/json"),
        post("content-length: 50000", "content-type: application/json"),
        post("transfer-encoding: chunked", "content-type: application/json"),
    ],
    ids=["small", "upload", "chunked"],
)
def test_slow_bodies_take_no_place_from_others(
    port: int, client: httpx.Client, upstream: Upstream, head: bytes
) -> None:
    """Thirty of them, where a replica holds four requests."""
    with ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            for _ in range(30)
        ]
        for one in slow:
            one.sendall(head + b"3\r\n")
        for _ in range(20):
            assert client.post(PREDICT, json=ROWS).status_code == 200
        for one in slow:
            answer = read_all(one)
            assert status_of(answer) == 408
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "timeout"


def test_slow_headers_are_ended(port: int) -> None:
    assert status_of(exchange(port, b"GET /healthz HTTP/1.1\r\nhost")) == 408


# Routes, methods, hosts, bytes.


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/-/routes", 404),
        ("GET", "/-/healthz", 404),
        ("GET", "/", 404),
        ("GET", "/metrics", 404),
        ("GET", "/v3/models", 404),
        ("GET", "/healthz/", 404),
        ("GET", "/HEALTHZ", 404),
        ("GET", "/V1/models", 404),
        ("GET", "//v1/models", 404),
        ("GET", "/v1//models", 404),
        ("GET", "/v1/../-/routes", 404),
        ("GET", "/v1/./models", 404),
        ("GET", "/v1/%2e%2e/-/routes", 404),
        ("GET", "/%2d/routes", 404),
        ("GET", "/v1/models;x", 404),
        ("GET", "/v1/models%00", 404),
        ("GET", "/v1/models\\x", 404),
        ("GET", "/v1/" + "x" * 3000, 414),
        ("OPTIONS", "*", 405),
        ("OPTIONS", "/v1/models", 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", "/v1/models", 405),
        ("TRACE", "/v1/models", 405),
        ("BREW", "/v1/models", 405),
    ],
)
def test_only_known_methods_and_routes_pass(
    port: int, upstream: Upstream, method: str, path: str, status: int
) -> None:
    answer = exchange(
        port, f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode()
    )
    assert status_of(answer) == status
    assert set(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) == {
        "type",
        "message",
        "field",
        "request_id",
    }
    assert upstream.seen == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("host: x/health?", 400),
        ("host: x y", 400),
        ("host: a,b", 400),
        ("host: x@y", 400),
        ("host:", 400),
        ("host: a\r\nhost: b", 400),
        ("accept: x", 400),
        ("host: x\r\nconnection: upgrade\r\nupgrade: websocket", 400),
        ("host: x\r\nconnection: upgrade\r\nupgrade: h2c, WebSocket", 400),
        ("host: x\r\nx-long: " + "x" * 9000, 431),
        ("host: x\r\ncontent-length: 3\r\ncontent-length: 4", 400),
        ("host: x\r\ncontent-length: 3, 4", 400),
        ("host: x\r\ncontent-length: -1", 400),
        ("host: x\r\ncontent-length: +3", 400),
        ("host: x\r\ncontent-length: 0x3", 400),
        ("host: x\r\ncontent-length: " + "9" * 40, 400),
        ("host: x\r\ntransfer-encoding: chunked, identity", 400),
        ("host: x\r\n folded: x", 400),
        ("host: x\r\nna me: x", 400),
        ("host: x\r\nname : x", 400),
        ("host: x\r\nname: \0", 400),
        ("host: x\r\n: x", 400),
    ],
)
def test_a_deceptive_head_is_refused(
    port: int, upstream: Upstream, headers: str, status: int
) -> None:
    head = (
        f"GET /v1/echo HTTP/1.1\r\n{headers}\r\nconnection: close\r\n\r\nabcGET / HTTP/1.1\r\n\r\n"
    )
    assert status_of(exchange(port, head.encode())) == status
    assert upstream.seen == []


def test_a_body_with_two_lengths_is_one_request(port: int, upstream: Upstream) -> None:
    """Chunks win, the length goes, and what follows is not taken for a second request."""
    head = post("content-length: 30", "transfer-encoding: chunked", path="/v1/echo")
    answer = exchange(port, head + b"0\r\n\r\nGET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
    assert answer.count(b"HTTP/1.") == 1
    assert status_of(answer) in (200, 400)
    assert all(
        "content-length" not in seen or seen["content-length"] == "0" for seen in upstream.seen
    )


def test_too_many_headers_are_refused(port: int) -> None:
    many = "".join(f"x{number}: y\r\n" for number in range(100))
    answer = exchange(port, f"GET /v1/echo HTTP/1.1\r\nhost: x\r\n{many}\r\n".encode())
    assert status_of(answer) in (400, 431)


# What comes back.

FLAT = {"error", "type", "field", "request_id"}
BELOW_V2 = "/v2/models/people/infer"


@pytest.mark.parametrize(
    ("line", "header", "body", "status"),
    [
        ("GET /v2/../-/routes", "accept: x", b"", 404),
        ("DELETE /v2", "accept: x", b"", 405),
        (f"POST {BELOW_V2}", "content-length: 9", b"x", 408),
        (f"POST {BELOW_V2}", "content-length: 50000", b"x", 408),
        (f"POST {BELOW_V2}", "content-length: 100001", b"", 413),
        (f"POST {BELOW_V2}", "transfer-encoding: chunked", b"fffff\r\n" + b"x" * 200_000, 413),
        ("GET /v2/" + "x" * 3000, "accept: x", b"", 414),
        (f"GET {BELOW_V2}", "x-long: " + "x" * 9000, b"", 431),
    ],
    ids=lambda value: None if isinstance(value, int) else str(value)[:40],
)
def test_below_v2_an_error_is_the_sentence_that_its_clients_show(
    port: int, upstream: Upstream, line: str, header: str, body: bytes, status: int
) -> None:
    start = f"{line} HTTP/1.1\r\nhost: x\r\n{header}\r\nconnection: close\r\n\r\n"
    head, _, body = exchange(port, start.encode(), body).partition(b"\r\n\r\n")
    assert status_of(head) == status
    error = json.loads(body)
    assert set(error) == FLAT
    assert f"x-request-id: {error['request_id']}".encode() in head
    told = SimpleNamespace(status_code=status, read=lambda: body)
    with pytest.raises(InferenceServerException) as raised:
        _raise_if_error(told)
    assert raised.value.message() == error["error"]
    assert raised.value.debug_details() is None
    assert upstream.seen == []


@pytest.mark.parametrize(("theirs", "ours"), [(404, 503), (418, 502), (429, 429), (504, 504)])
def test_a_client_of_v2_reads_an_error_that_is_not_ours(
    served: tuple[Edge, Upstream, str], theirs: int, ours: int
) -> None:
    sentence = ERRORS[ours][1]
    with (
        InferenceServerClient(f"127.0.0.1:{served[0].port}") as triton,
        pytest.raises(InferenceServerException, match=rf"^\[{ours}\] {sentence}$"),
    ):
        triton.get_model_metadata(f"fail{theirs}")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (400, 400),
        (404, 503),
        (418, 502),
        (429, 429),
        (500, 503),
        (502, 502),
        (503, 503),
        (504, 504),
    ],
)
def test_an_error_that_is_not_ours_gets_our_shape(
    client: httpx.Client, theirs: int, ours: int
) -> None:
    answer = client.get(f"/v1/fail/{theirs}")
    assert answer.status_code == ours
    assert "routes" not in str(check_error(answer))
    assert ("retry-after" in answer.headers) == (ours in (429, 503))


def test_a_client_that_leaves_ends_its_request(
    port: int, upstream: Upstream, wait_until: WaitUntil
) -> None:
    upstream.gone.clear()
    head = b"GET /v1/wait HTTP/1.1\r\nhost: x\r\nx-request-disconnect-disabled: ?1\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head)
        wait_until(lambda: upstream.seen)
    assert upstream.gone.wait(5)


def test_more_than_it_holds_is_429_at_once(tmp_path: Path, wait_until: WaitUntil) -> None:
    with (
        serve(tmp_path, limits=replace(LIMITS, max_requests=2)) as (edge, upstream, _),
        concurrent.futures.ThreadPoolExecutor(2) as pool,
    ):
        waiting = [pool.submit(httpx.get, f"{edge.url}/v1/wait", timeout=30) for _ in range(2)]
        wait_until(lambda: len(upstream.seen) == 2)
        refused = httpx.get(f"{edge.url}/v1/wait")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert check_error(refused)["type"] == "overloaded"
        upstream.release.set()
        assert [answer.result().status_code for answer in waiting] == [200, 200]


def test_a_server_that_starts_anew_costs_patience_and_no_request(tmp_path: Path) -> None:
    upstream = Upstream(make_app(MODELS, REPLICA_LIMITS), pick_port())
    edge = Edge(pick_port(), upstream.port, limits=LIMITS)
    with ExitStack() as first, concurrent.futures.ThreadPoolExecutor(1) as pool:
        first.enter_context(upstream.run())
        with run_edge(edge, tmp_path):
            assert httpx.post(f"{edge.url}{PREDICT}", json=ROWS).status_code == 200
            first.close()
            answer = pool.submit(httpx.post, f"{edge.url}{PREDICT}", json=ROWS, timeout=30)
            with upstream.run():
                assert answer.result().status_code == 200


def test_a_server_that_is_away_has_another_in_its_place_until_it_is_back(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    first, spare = (Upstream(make_app(MODELS, REPLICA_LIMITS), pick_port()) for _ in range(2))
    edge = Edge(pick_port(), first.port, limits=LIMITS, spare_port=spare.port)
    echo, upload = f"{edge.url}/v1/echo", b"x" * (LIMITS.small_body_bytes + 1)

    def ask() -> None:
        answers = [httpx.post(echo, timeout=30, content=body) for body in (b"x", upload)]
        assert [answer.status_code for answer in answers] == [200, 200]

    def is_first_asked() -> bool:
        ask()
        return bool(first.seen)

    with spare.run(), ExitStack() as life:
        life.enter_context(first.run())
        with run_edge(edge, tmp_path):
            ask()
            assert (len(first.seen), len(spare.seen)) == (2, 0)
            life.close()
            first.seen.clear()
            for _ in range(5):
                ask()
            assert (len(first.seen), len(spare.seen)) == (0, 10)
            with first.run():
                wait_until(is_first_asked)


@pytest.mark.faults
def test_without_a_server_the_answer_is_503_in_seconds(tmp_path: Path) -> None:
    edge = Edge(pick_port(), pick_port(), limits=LIMITS)
    with run_edge(edge, tmp_path):
        for path in (PREDICT, BELOW_V2):
            answer = httpx.post(f"{edge.url}{path}", json=ROWS, timeout=30)
            assert answer.status_code == 503
            check_error(answer)


# TLS.


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Edge, Path]]:
    directory = tmp_path_factory.mktemp("tls")
    certificate = make_certificate(directory)
    with serve(directory, certificate=str(certificate)) as (edge, _, _):
        yield edge, certificate


def test_tls_answers_to_who_trusts_the_certificate(secure: tuple[Edge, Path]) -> None:
    edge, certificate = secure
    assert edge.url.startswith("https://")
    trusting = ssl.create_default_context(cafile=str(certificate))
    with httpx.Client(verify=trusting) as client:
        assert client.post(f"{edge.url}{PREDICT}", json=ROWS).status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{edge.url}/healthz")
    assert not exchange(edge.port, GOOD).startswith(b"HTTP/1.1 200")


def test_old_tls_is_refused(secure: tuple[Edge, Path]) -> None:
    edge, certificate = secure
    context = ssl.create_default_context(cafile=str(certificate))
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", edge.port)) as plain,
        pytest.raises(ssl.SSLError),
    ):
        context.wrap_socket(plain, server_hostname="127.0.0.1")


@pytest.mark.parametrize("size", [0, 9_999, 99_999])
def test_http2_has_the_same_limits(secure: tuple[Edge, Path], tmp_path: Path, size: int) -> None:
    edge, certificate = secure
    (tmp_path / "body").write_bytes(b"x" * size)
    command: list[str | Path] = ["curl", "-s", "--http2", "--cacert", certificate]
    command += ["-o", tmp_path / "answer"]
    command += ["-w", "%{http_version} %{http_code}", "--data-binary", f"@{tmp_path / 'body'}"]
    command += ["-H", "x-request-timeout-seconds: 0", f"{edge.url}/v1/echo"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    answer = json.loads((tmp_path / "answer").read_text())
    assert said == "2 200"
    assert answer["body_bytes"] == size
    assert "x-request-timeout-seconds" not in answer["headers"]


def test_http2_is_spoken_with_the_usual_limits(tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path)
    (tmp_path / "body").write_bytes(b"x" * 3_000_000)
    with serve(tmp_path, limits=Limits(), certificate=str(certificate)) as (edge, _, _):
        command = ["curl", "-s", "--http2", "--cacert", str(certificate), "-w", "%{http_version}"]
        command += ["--data-binary", f"@{tmp_path / 'body'}", f"{edge.url}/v1/echo"]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout[-1:]) == (0, "2"), said
    assert json.loads(said.stdout[:-1])["body_bytes"] == 3_000_000


@pytest.mark.parametrize(
    ("length", "sent", "status"),
    [
        (["150000"], 0, 413),
        (["150000"], 1000, 413),
        ([str(2**32 + 1)], 1000, 413),
        (["9000"], 1000, 408),
        (["50000"], 1000, 408),
        ([], 1000, 408),
    ],
)
def test_http2_bounds_bodies_alike(
    secure: tuple[Edge, Path], length: list[str], sent: int, status: int
) -> None:
    edge, certificate = secure
    context = ssl.create_default_context(cafile=str(certificate))
    context.set_alpn_protocols(["h2"])
    speaker = h2.connection.H2Connection()
    speaker.initiate_connection()
    head = {":method": "POST", ":path": PREDICT, ":scheme": "https", ":authority": "x"}
    speaker.send_headers(1, [*head.items(), *(("content-length", value) for value in length)])
    speaker.send_data(1, b"x" * sent)
    with (
        socket.create_connection(("127.0.0.1", edge.port), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as client,
    ):
        client.sendall(speaker.data_to_send())
        events: list[object] = []
        while not any(isinstance(event, h2.events.StreamEnded) for event in events):
            events += speaker.receive_data(client.recv(65536))
    (answer,) = (event for event in events if isinstance(event, h2.events.ResponseReceived))
    assert dict(answer.headers)[b":status"] == str(status).encode()


# Its processes.


def find_haproxy(marker: str) -> list[int]:
    return [p.pid for p in processes.find(marker) if p.info["name"] == local_edge.PROGRAM]


def test_a_killed_edge_is_back_within_seconds(tmp_path: Path, wait_until: WaitUntil) -> None:
    with serve(tmp_path) as (edge, _, marker):
        (pid,) = find_haproxy(marker)
        killed_at = time.monotonic()
        next(p for p in processes.find(marker) if p.pid == pid).send_signal(signal.SIGKILL)
        wait_until(lambda: find_haproxy(marker) not in ([], [pid]))

        def answers() -> bool:
            try:
                return httpx.get(f"{edge.url}/healthz").status_code == 200
            except httpx.ConnectError:
                return False

        wait_until(answers)
        assert time.monotonic() - killed_at < 6


def test_a_stopped_edge_answers_those_inside_and_leaves_nothing(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    with (
        serve(tmp_path) as (edge, upstream, marker),
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        inside = pool.submit(httpx.get, f"{edge.url}/v1/wait", timeout=30)
        wait_until(lambda: upstream.seen)
        local_edge.drain(marker)

        def is_closed() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", edge.port)) != 0

        wait_until(is_closed)
        upstream.release.set()
        assert inside.result().status_code == 200
        wait_until(lambda: processes.find(marker) == [])


def test_a_taken_port_is_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        edge = Edge(other.getsockname()[1], pick_port())
        with pytest.raises(HeliostatError, match="cannot bind"), run_edge(edge, tmp_path):
            pass


def test_no_secret_is_logged(served: tuple[Edge, Upstream, str], tmp_path: Path) -> None:
    with serve(tmp_path) as (edge, _, _):
        for path in ("/v1/models", "/-/routes", "/v1/fail/500"):
            headers = {"authorization": "Bearer canary"}
            httpx.get(f"{edge.url}{path}?key=canary", headers=headers)
        exchange(edge.port, b"GET /canary\r\nhost\r\n\r\n")
    assert "canary" not in (tmp_path / "edge.log").read_text()


# Whatever is sent, no answer is the server's fault, and the next one is answered.

tokens = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=12)
anything = st.one_of(tokens, st.text(max_size=8), st.sampled_from(["", " ", "\0", "\r", "\n", "é"]))
methods = st.one_of(st.sampled_from(["GET", "POST", "HEAD", "PUT", "get", "PRI"]), anything)
paths = st.one_of(
    st.sampled_from([PREDICT, "/v1/models", "/healthz", "/v1/echo", "/-/routes", "*", "http://x/"]),
    st.lists(st.sampled_from(["v1", "v2", "..", ".", "", "%2e", "-", "models", "x:y"])).map(
        lambda parts: "/" + "/".join(parts)
    ),
    anything,
)
names = st.one_of(
    st.sampled_from(
        [
            "content-length",
            "transfer-encoding",
            "host",
            "connection",
            "expect",
            "upgrade",
            "x-request-id",
            "x-timeout-seconds",
            "content-type",
            "te",
            "range",
        ]
    ),
    anything,
)
contents = st.one_of(
    st.sampled_from(
        ["0", "3", "-1", "1e9", "chunked", "100-continue", "close", "application/json"]
    ),
    st.integers(-(2**65), 2**65).map(str),
    anything,
)
headers = st.lists(st.tuples(names, contents).map(": ".join), max_size=6)
bodies = st.one_of(
    st.binary(max_size=64), st.sampled_from([b"0\r\n\r\n", b"5\r\nabc", b"zz\r\n", b"{}"])
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    version = draw(st.sampled_from(["HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/9.9", "", "x"]))
    lines = [f"{draw(methods)} {draw(paths)} {version}", *draw(headers)]
    host = draw(st.sampled_from([["host: x"], []]))
    head = "\r\n".join([*lines, *host, "", ""]).encode()
    whole = head + draw(bodies)
    cut = draw(st.one_of(st.none(), st.integers(0, len(whole))))
    return whole[:cut]


def check_any_bytes(client: httpx.Client, port: int, request: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sender:
        sender.sendall(request)
        sender.shutdown(socket.SHUT_WR)
        answer = read_all(sender)
    assert not answer or 100 <= status_of(answer) < 500, (request, answer)
    assert client.get("/healthz").status_code == 200


@given(requests())
@settings(
    max_examples=300, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)
def test_no_bytes_make_the_edge_fail(
    served: tuple[Edge, Upstream, str], client: httpx.Client, request_bytes: bytes
) -> None:
    check_any_bytes(client, served[0].port, request_bytes)


@pytest.mark.faults
@given(requests())
@settings(max_examples=10_000, suppress_health_check=list(HealthCheck), database=None)
def test_no_bytes_of_ten_thousand_make_the_edge_fail(
    served: tuple[Edge, Upstream, str], client: httpx.Client, request_bytes: bytes
) -> None:
    check_any_bytes(client, served[0].port, request_bytes)
