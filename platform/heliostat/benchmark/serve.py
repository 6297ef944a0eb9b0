"""Requests per second over HTTP: Heliostat, FastAPI, LitServe and BentoML on the same networks."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heliostat import evaluate, keys, local, storage
from heliostat.benchmark.load import Reading, check_program, press
from heliostat.benchmark.peers import fastapi_server
from heliostat.benchmark.questions import Question, ask_binary, ask_fastapi, ask_ours, ask_rows
from heliostat.benchmark.servers import find_port, pause, run_server
from heliostat.benchmark.subjects import LENET, MLP, Subject, publish_subject, save_script
from heliostat.data.features import IMAGE
from heliostat.errors import HeliostatError
from heliostat.keys import Limits
from heliostat.local.home import Home
from heliostat.registry import Version
from heliostat.storage import Store

PEERS = Path(os.environ.get("HELIOSTAT_WEB_PEERS", "/tmp/heliostat-web-peers"))
SCRIPTS = Path(fastapi_server.__file__).parent
CONNECTIONS, ROUND_SECONDS, WARM_SECONDS = 64, 3, 1
REPLICAS = fastapi_server.PROCESSES
NICENESS = 5  # as Ray starts replicas, beside whatever else runs on the machine
ATOL = 1e-5
# Limits that are counted and never reached.
LIMITS = Limits(requests_per_second=1e6, tokens_per_minute=1e9, rows_per_month=10**12)
OURS = ("heliostat", "heliostat_edge")
NAMES = (*OURS, "fastapi", "fastapi_gate", "litserve", "bentoml")
ALONE = NAMES[:4]  # who is asked over one connection as well

Say = Callable[[str], None]
Asked = dict[str, Question]
Groups = dict[str, int]


@dataclass(frozen=True)
class Command:
    """How a peer is started with a model, where it says that it is up, and how it is asked."""

    words: Callable[[Path, int], list[str]]
    health: str
    ask: Callable[[str, Subject], Question]
    settings: Callable[[Path], Mapping[str, str]] = lambda model: {}


@dataclass(frozen=True)
class Case:
    """Servers that take turns at one question."""

    name: str
    asked: Asked
    connections: int = CONNECTIONS


@dataclass(frozen=True)
class Outcome:
    """A server's median round; `ratio` is the median of Heliostat's requests/s over its own.

    Both sides of a ratio are of one round: a machine that is faster for a minute is so for both.
    """

    reading: Reading
    ratio: float


def measure(repeats: int, say: Say) -> dict[str, dict[str, Outcome | None]]:
    """The outcome of each server by case; None: it is not installed, or failed a request.

    Raises:
        HeliostatError: there is no wrk; a server does not start, or answers otherwise than the
            network does offline; a request to Heliostat failed.
    """
    check_program()
    found: dict[str, dict[str, Outcome | None]] = {}
    with tempfile.TemporaryDirectory(prefix="heliostat-benchmark-") as directory:
        folder = Path(directory)
        with run_cluster(folder / "home", say) as cluster:
            store = storage.connect(cluster.root)
            token, _ = keys.create(store, "the benchmark", limits=LIMITS)
            for subject, list_cases in ((MLP, list_mlp_cases), (LENET, list_cnn_cases)):
                version = serve(store, subject)
                expected = answer_offline(store, version, subject)
                with run_peers(folder, subject, cluster.root, token, say) as (peers, groups):
                    for case in list_cases(cluster, peers, token):
                        answers = {name: one.ask() for name, one in case.asked.items()}
                        check_answers(answers, expected)
                        found[case.name] = run_rounds(case, groups, repeats, say)
    return found


def list_mlp_cases(cluster: local.Cluster, peers: Asked, token: str) -> list[Case]:
    asked = ask_both(ask_ours, cluster, MLP, token) | peers
    return [
        Case("mlp_json", asked),
        Case("mlp_binary", ask_both(ask_binary, cluster, MLP, token)),
        Case("one_connection", {name: asked[name] for name in ALONE}, connections=1),
    ]


def list_cnn_cases(cluster: local.Cluster, peers: Asked, token: str) -> list[Case]:
    return [Case("cnn", ask_both(ask_ours, cluster, LENET, token) | peers)]


def ask_both(
    ask: Callable[[str, Subject, str], Question],
    cluster: local.Cluster,
    subject: Subject,
    token: str,
) -> Asked:
    """By the port of Serve's own proxy, and through the edge."""
    bases = (cluster.serve_url, cluster.edge_url)
    return {name: ask(base, subject, token) for name, base in zip(OURS, bases, strict=True)}


@contextmanager
def run_cluster(path: Path, say: Say) -> Iterator[local.Cluster]:
    """A laptop cluster of the benchmark's own; this process's environment points at it."""
    home = Home(path)
    try:
        cluster = local.start(home, free_ports=True, report=say)
        os.environ.update(cluster.env)
        yield cluster
    finally:
        local.stop(home)


def serve(store: Store, subject: Subject) -> Version:
    """As a user does, on as many replicas as the peers have processes.

    Raises:
        HeliostatError: it was not deployed.
    """
    version = publish_subject(store, subject)
    command = [sys.executable, "-m", "heliostat.cli", "deploy", version.ref]
    if subprocess.run([*command, f"replicas={REPLICAS}"], check=False).returncode:
        raise HeliostatError(f"{version.ref} was not deployed, the lines above say why")
    return version


def answer_offline(store: Store, version: Version, subject: Subject) -> NDArray[np.float32]:
    predictor = evaluate.load_predictor(store, version)
    first: NDArray[np.float32] = evaluate.predict(predictor, {IMAGE: subject.image})[0]
    return first


def list_commands(root: str, token: str) -> dict[str, Command]:
    """The peers that are installed; those that are not Python packages of ours have a venv."""
    fastapi = [sys.executable, "-m", fastapi_server.__name__]
    litserve = [str(PEERS / "bin/python"), str(SCRIPTS / "litserve_server.py")]
    bentoml = [str(PEERS / "bin/bentoml"), "serve", "bentoml_server:Classifier", "--working-dir"]
    commands = {
        "fastapi": Command(
            lambda model, port: [*fastapi, str(model), str(port)], "/healthz", ask_fastapi
        ),
        "fastapi_gate": Command(
            lambda model, port: [*fastapi, str(model), str(port), root],
            "/healthz",
            lambda base, subject: ask_fastapi(base, subject, token),
        ),
        "litserve": Command(
            lambda model, port: [*litserve, str(model), str(port)], "/health", ask_rows
        ),
        "bentoml": Command(
            lambda model, port: [*bentoml, str(SCRIPTS), "--port", str(port)],
            "/readyz",
            ask_rows,
            lambda model: {
                "BENCHMARK_MODEL": str(model),
                "BENTOML_HOME": str(model.parent),
                "BENTOML_DO_NOT_TRACK": "True",
            },
        ),
    }
    return {
        name: command
        for name, command in commands.items()
        if Path(command.words(Path(), 0)[0]).exists()
    }


@contextmanager
def run_peers(
    folder: Path, subject: Subject, root: str, token: str, say: Say
) -> Iterator[tuple[Asked, Groups]]:
    """All that are installed, each a server of this one network, and their process groups."""
    model = folder / f"{subject.name}.pt"
    save_script(subject, model)
    asked, groups = {}, {}
    with ExitStack() as stack:
        for name, command in list_commands(root, token).items():
            port = find_port()
            base = f"http://127.0.0.1:{port}"
            words = ["nice", f"-n{NICENESS}", *command.words(model, port)]
            log = folder / f"{name}.log"
            groups[name] = stack.enter_context(
                run_server(words, base + command.health, log, command.settings(model))
            )
            say(f"{name} answers")
            asked[name] = command.ask(base, subject)
        yield asked, groups


def check_answers(answers: Mapping[str, NDArray[Any]], expected: NDArray[np.float32]) -> None:
    """Raises HeliostatError: a server answers otherwise than the network does."""
    for name, found in answers.items():
        if found.shape != expected.shape or not np.allclose(found, expected, atol=ATOL):
            raise HeliostatError(f"{name} answers {found.round(4)} instead of {expected.round(4)}")


def run_rounds(case: Case, groups: Groups, repeats: int, say: Say) -> dict[str, Outcome | None]:
    """A first, short round that does not count, then `repeats` in turn.

    A peer that fails a request says so and is left out. Those that are not asked stand still, all
    but the cluster, which goes on.

    Raises:
        HeliostatError: a request to Heliostat failed.
    """
    asked, rounds = dict(case.asked), dict[str, list[Reading]]()
    for seconds in (WARM_SECONDS, *repeat(ROUND_SECONDS, repeats)):
        for name, question in list(asked.items()):
            others = (group for other, group in groups.items() if other != name)
            try:
                with pause(others):
                    reading = press(question.request, case.connections, seconds)
            except HeliostatError as error:
                if name in OURS:
                    raise
                say(f"{name} is left out: {error}")
                del asked[name]
                continue
            if seconds == ROUND_SECONDS:
                rounds.setdefault(name, []).append(reading)
                say(f"{case.name:<14} {name:<14} {reading.requests_per_second:8,.0f} requests/s")
    ours = rounds["heliostat"]
    return {name: compare(ours, rounds[name]) if name in asked else None for name in NAMES}


def compare(ours: Sequence[Reading], theirs: Sequence[Reading]) -> Outcome:
    """The outcome of `theirs`, round by round beside ours."""
    pairs = zip(ours, theirs, strict=True)
    ratios = (mine.requests_per_second / other.requests_per_second for mine, other in pairs)
    return Outcome(take_median(theirs), median(ratios))


def take_median(readings: Sequence[Reading]) -> Reading:
    """Of each figure."""
    return Reading(*(median(values) for values in zip(*map(astuple, readings), strict=True)))
