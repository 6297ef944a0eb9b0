"""What a deploy that does not end well leaves behind, against a hand-made Serve over HTTP."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.numpy import save

from drafting import draft
from heliostat import registry
from heliostat.data.features import ImageFeatures
from heliostat.environment import EDGE_URL
from heliostat.errors import HeliostatError
from heliostat.serve import control
from heliostat.serve.control import HTTP_OPTIONS
from heliostat.serve.deploy import deploy as release
from heliostat.serve.replica import name_proof
from heliostat.serve.table import (
    TABLE_KEY,
    Placement,
    Table,
    place,
    read_table,
    succeed,
    take_back,
)
from heliostat.spec import DeploySpec, RunSpec, parse
from heliostat.storage import Store, connect

App = dict[str, Any]


def application(status: str, message: str = "") -> App:
    replica = {"state": "RUNNING" if status == "RUNNING" else "STARTING"}
    deployment = {"message": message, "replicas": [replica]}
    return {
        "status": status,
        "message": "",
        "deployments": {"Replica": deployment},
        "deployed_app_config": None,
    }


RUNNING = application("RUNNING")
NO_ROOM = application("DEPLOYING", "no node has 1 free CPU")


class FakeServe(BaseHTTPRequestHandler):
    """Ray's dashboard as far as a deploy sees it: `settle` says what becomes of each config."""

    settle: Callable[[int], App | None]
    num_configs = 0
    deployed: App
    http_options = HTTP_OPTIONS

    def do_GET(self) -> None:
        app = type(self).settle(self.num_configs) if self.num_configs else None
        if self.path == "/api/ray/version":
            self.answer({"ray_version": "2.60.0"})
        elif app != {}:  # else a dashboard that died: no answer at all
            applications = {"heliostat": app} if app else {}
            self.answer({"applications": applications, "http_options": self.http_options})

    def do_PUT(self) -> None:
        config = json.loads(self.rfile.read(int(self.headers["content-length"])))
        type(self).deployed = config["applications"][0]
        type(self).num_configs += 1
        self.answer({})

    def answer(self, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeServe]]:
    """A Serve to deploy to; give it `settle`."""
    handler = type("Handler", (FakeServe,), {})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.delenv(EDGE_URL, raising=False)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield handler
        server.shutdown()
        thread.join()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A registry with digits:1, which is served, and digits:2."""
    store = connect(str(tmp_path))
    for run in ("first", "second"):
        made = draft("digits", ImageFeatures(4, 4, 1, (0.5,), (0.25,)), run=run)
        registry.publish(store, made, save({"w": np.zeros(1, np.float32)}))
    store.write(TABLE_KEY, SERVED.model_dump_json().encode())
    return store


SERVED = Table(
    models={"digits": Placement(number=1), "letters": Placement(number=4)},
    deploy=DeploySpec(replicas=3),
    code="c" * 64,
)


def deploy(spec: RunSpec) -> str:
    return release(connect(spec.root), spec.name, spec.deploy)


def second(store: Store, **section: Any) -> RunSpec:
    return parse(
        {
            "name": "digits",
            "root": store.uri,
            "data": {"source": "raw"},
            "model": {"kind": "mlp"},
            "deploy": section,
        }
    )


def test_what_runs_stays_in_the_table(store: Store, serve: type[FakeServe]) -> None:
    serve.settle = lambda configs: RUNNING
    assert deploy(second(store)) == "http://127.0.0.1:8000/v1/models/digits:predict"
    assert read_table(store).models == {
        "digits": Placement(number=2, previous=(1,)),
        "letters": Placement(number=4),
    }


def test_what_the_table_says_and_nobody_serves_is_deployed(
    store: Store, serve: type[FakeServe], capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a deploy was killed between the table and the cluster."""
    serve.settle = lambda configs: RUNNING | {"deployed_app_config": serve.deployed}
    deploy(second(store))
    assert serve.num_configs == 1
    assert store.stat(name_proof(serve.deployed["args"]))
    deploy(second(store))
    assert serve.num_configs == 1
    assert "digits:2 is served already" in capsys.readouterr().out
    serve.deployed["args"]["models"] = {"digits": [1], "letters": [4]}
    deploy(second(store))
    assert serve.num_configs == 2
    assert serve.deployed["args"]["models"]["digits"] == [2, 1]


def test_without_keys_it_warns_and_is_refused_where_others_can_reach_it(
    store: Store,
    serve: type[FakeServe],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve.settle = lambda configs: RUNNING
    deploy(second(store, auth=False))
    assert "WARNING: deploy.auth is off" in capsys.readouterr().out
    before = read_table(store)
    serve.http_options = {"host": "0.0.0.0", "port": 8000}
    with pytest.raises(HeliostatError, match=r"auth is off and Serve listens on 0\.0\.0\.0"):
        deploy(second(store, auth=False))
    serve.http_options = {"host": "127.0.0.1", "port": 8000}
    monkeypatch.setenv("HELIOSTAT_EDGE_HOST", "0.0.0.0")
    with pytest.raises(HeliostatError, match=r"auth is off and the edge listens on 0\.0\.0\.0"):
        deploy(second(store, auth=False))
    assert read_table(store) == before
    deploy(second(store))
    assert "WARNING" not in capsys.readouterr().out


def test_larger_bodies_than_the_edge_lets_pass_are_refused(
    store: Store, serve: type[FakeServe]
) -> None:
    serve.settle = lambda configs: RUNNING
    with pytest.raises(HeliostatError, match=r"max_body_mib is 16\.5, the edge lets 16 MiB pass"):
        deploy(second(store, max_body_mib=16.5))
    assert read_table(store) == SERVED
    deploy(second(store, max_body_mib=16.0))


def test_a_version_that_cannot_start_is_taken_back_with_its_reason(
    store: Store, serve: type[FakeServe]
) -> None:
    failed = application("DEPLOY_FAILED", "Traceback\nValueError: size mismatch")
    serve.settle = lambda configs: failed if configs == 1 else RUNNING
    with pytest.raises(HeliostatError, match=r"^digits:2 was not deployed, digits:1 is still serv"):
        deploy(second(store))
    assert (read_table(store), serve.num_configs) == (SERVED, 2)
    proven = [entry.key for entry in store.list("serving/proven/")]
    assert proven == [name_proof(serve.deployed["args"])]  # of what was served before


def test_the_first_reason_is_told_if_taking_back_fails_too(
    store: Store, serve: type[FakeServe]
) -> None:
    serve.settle = lambda configs: application("DEPLOY_FAILED", f"ValueError: reason {configs}")
    with pytest.raises(HeliostatError, match=r"did not go back .*reason 2\): ValueError: reason 1"):
        deploy(second(store))
    assert read_table(store) == SERVED


def test_an_interrupted_deploy_is_taken_back(
    store: Store, serve: type[FakeServe], capsys: pytest.CaptureFixture[str]
) -> None:
    interrupts = [signal.SIGINT]

    def interrupt_once(configs: int) -> App:
        if interrupts:
            os.kill(os.getpid(), interrupts.pop())
        return RUNNING if configs == 2 else NO_ROOM

    serve.settle = interrupt_once
    with pytest.raises(KeyboardInterrupt):
        deploy(second(store))
    assert (read_table(store), serve.num_configs) == (SERVED, 2)
    assert "digits:2 was not deployed, digits:1 is still served" in capsys.readouterr().out


def test_a_serve_that_stops_answering_is_a_sentence_and_taken_back(
    store: Store, serve: type[FakeServe]
) -> None:
    looks = chain([{}], repeat(RUNNING))
    serve.settle = lambda configs: next(looks)
    with pytest.raises(HeliostatError, match=r"still served: Ray Serve cannot be reached"):
        deploy(second(store))
    assert read_table(store) == SERVED


def test_no_serve_at_all_is_a_sentence_before_anything_moves(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    with pytest.raises(HeliostatError, match="RAY_API_SERVER_ADDRESS is its dashboard"):
        deploy(second(store))
    assert read_table(store) == SERVED


def test_the_wait_for_a_node_has_an_end_and_says_what_it_waits_for(
    store: Store,
    serve: type[FakeServe],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(control, "REPORT_SECONDS", 0)
    serve.settle = lambda configs: NO_ROOM if configs == 1 else RUNNING
    with pytest.raises(HeliostatError, match=r"not start within 0\.01 s: no node has 1 free CPU"):
        deploy(second(store, start_timeout_s=0.01))
    assert "replicas 1 STARTING - no node has 1 free CPU" in capsys.readouterr().out


def test_a_damaged_table_is_a_sentence_with_its_key(store: Store) -> None:
    for damaged in (b"", b"{", b"[]", b'{"models": {"digits": 1}}'):
        store.write(TABLE_KEY, damaged)
        with pytest.raises(HeliostatError, match=rf"{TABLE_KEY}.* is damaged"):
            read_table(store)


HOW = st.fixed_dictionaries(
    {
        "deploy": st.builds(DeploySpec, replicas=st.integers(1, 2)),
        "code": st.sampled_from(["1" * 64, "2" * 64]),
    }
)
DEPLOYS = st.tuples(st.sampled_from("ab"), st.integers(1, 3), HOW)


def replay(table: Table, deploys: list[tuple[str, int, dict[str, Any]]]) -> Table:
    for name, number, how in deploys:
        table = place(table, name, succeed(table.models.get(name), number, keep=1), **how)
    return table


@given(st.lists(DEPLOYS, max_size=3), DEPLOYS, st.lists(DEPLOYS, max_size=3))
def test_taking_back_leaves_the_table_as_if_the_deploy_had_not_been(
    earlier: list[Any], failed: tuple[str, int, dict[str, Any]], later: list[Any]
) -> None:
    before = replay(Table(), earlier)
    written, now = replay(before, [failed]), replay(before, [failed, *later])
    # Nobody can tell the same version deployed again from the one that failed.
    assume(failed[:2] not in [deploy[:2] for deploy in later])
    assume(now != written or not later)
    taken, wanted = (
        take_back(now, name=failed[0], written=written, before=before),
        replay(before, later),
    )
    assert taken == wanted
