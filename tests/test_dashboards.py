"""Dashboards: the files are the code's, Grafana can lay them out, and every query returns data."""

import itertools
import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.state import list_actors

from datasets import store_images
from heliostat import dashboards, local, spec, storage
from heliostat.dashboards import DASHBOARDS, Dashboard, Query
from heliostat.data.prepare import prepare
from heliostat.metrics import TRAINING
from heliostat.spec import RunSpec
from heliostat.storage import Store
from heliostat.train import checkpoint
from heliostat.train.launch import train

FOLDER = Path(__file__).parents[1] / "dashboards"
DOCUMENTS = {name: json.loads(dashboards.render(board)) for name, board in DASHBOARDS.items()}
QUERIES = [
    pytest.param(query, id=f"{name}-{panel.title}-{place}")
    for name, board in DASHBOARDS.items()
    for panel in board.panels
    for place, query in enumerate(panel.queries)
]


def test_the_rendered_files_are_those_of_the_code(tmp_path: Path) -> None:
    written = {path.name: path.read_text() for path in dashboards.write(tmp_path)}
    assert {path.name: path.read_text() for path in FOLDER.glob("*.json")} == written


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_panels_share_the_grid_without_overlap(document: dict[str, Any]) -> None:
    cells = [
        (column, row)
        for place in (panel["gridPos"] for panel in document["panels"])
        for column in range(place["x"], place["x"] + place["w"])
        for row in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert {column for column, _ in cells} <= set(range(24))


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_what_grafana_tells_panels_and_queries_apart_by_is_unique(document: dict[str, Any]) -> None:
    panels = document["panels"]
    assert len({panel["id"] for panel in panels}) == len({p["title"] for p in panels})
    assert len(panels) == len({panel["id"] for panel in panels})
    for panel in panels:
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references)) > 0


@pytest.mark.parametrize("board", DASHBOARDS.values(), ids=DASHBOARDS)
def test_every_metric_of_the_table_is_on_a_panel(board: Dashboard) -> None:
    asked = " ".join(query.expression for panel in board.panels for query in panel.queries)
    assert [name for name, metric in TRAINING.items() if f"{metric.scraped}{{" not in asked] == []


# --- A real Prometheus and a real run ------------------------------------------------------------


class Prometheus:
    """The server at `url`, asked over HTTP."""

    def __init__(self, url: str):
        self.url = url

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def query(self, expression: str) -> list[float]:
        """Every value of the last ten minutes."""
        now = time.time()
        asked = {"query": expression, "start": now - 600, "end": now, "step": 5}
        url = f"{self.url}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            series = json.load(answer)["data"]["result"]
        return [float(value) for one in series for _, value in one["values"]]


@pytest.fixture(scope="module")
def prometheus(
    cluster: local.Cluster,
    tmp_path_factory: pytest.TempPathFactory,
    wait_until: Callable[..., None],
) -> Iterator[Prometheus]:
    """A Prometheus that scrapes every node of the cluster, found where Ray lists them."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus on the PATH: apt-get install prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    session = cluster.state.ray_directory / "session_latest"
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [
            {
                "job_name": "ray",
                "file_sd_configs": [
                    {"files": [str(session / "prom_metrics_service_discovery.json")]}
                ],
            }
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [program, f"--config.file={folder}/prometheus.yml"]
    command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
        server = Prometheus(f"http://{address}")
        try:
            wait_until(server.is_ready)
            yield server
        finally:
            process.kill()


@pytest.fixture(scope="module")
def runs(cluster: local.Cluster, prometheus: Prometheus, wait_until: Callable[..., None]) -> str:
    """A pattern of the names of two runs that Prometheus has scraped.

    A worker of the one, which trains on a text, was killed; the other trains on pictures.
    """
    ray.init(ignore_reinit_error=True, logging_level="ERROR", log_to_driver=False)
    store = storage.connect(f"{cluster.root}/dashboards")
    text = make_run(store, "shown-text", text_sections(store), workers=2, validate_steps=100)
    pictures = make_run(store, "shown-pictures", PICTURES, workers=1)
    with ThreadPoolExecutor(2) as threads:
        pending = threads.submit(train, text, prepare(text))
        wait_until(lambda: checkpoint.committed(store, "shown-text") or pending.done(), 120)
        assert not pending.done(), pending.result()
        workers = [("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")]
        psutil.Process(list_actors(filters=workers)[0].pid).kill()
        beside = threads.submit(train, pictures, store_images(store, {"train": 400}))
        pending.result()
        beside.result()
    return "shown-.*"


PICTURES = {"data": {"source": "unused"}, "model": {"kind": "mlp"}}


def text_sections(store: Store) -> dict[str, Any]:
    paragraphs = (FOLDER.parent / "LICENSE").read_text().split("\n\n")
    lines = [json.dumps({"text": paragraph}) for paragraph in paragraphs]
    store.write("raw/license.jsonl", "\n".join(lines).encode())
    data = {
        "source": f"{store.uri}/raw",
        "format": "text",
        "task": "language",
        "text": {"vocab": 300, "block": 16},
        "split": {"validation": 0.3},
    }
    model = {"kind": "gpt", "width": 32, "layers": 1, "heads": 2, "kv_heads": 1}
    return {"data": data, "model": model}


def make_run(store: Store, name: str, sections: dict[str, Any], **train: Any) -> RunSpec:
    """Ends after twice the time in which Ray exports its metrics."""
    section = {"run": name, "epochs": 10_000, "stop": {"seconds": 20.0}, **train}
    return spec.parse({"name": name, "root": store.uri, **sections, "train": section})


@pytest.mark.cluster
@pytest.mark.parametrize("query", QUERIES)
def test_a_real_run_answers_every_query(prometheus: Prometheus, runs: str, query: Query) -> None:
    values = prometheus.query(query.expression.replace("$run", runs))
    assert any(values), f"{query.expression} gives {values[:3]}"


@pytest.mark.cluster
def test_a_query_for_another_run_gives_nothing(prometheus: Prometheus, runs: str) -> None:
    """Without this the law above could hold for queries that do not look at the run."""
    asked = [
        query.expression.replace("$run", f"no-{runs}")
        for board in DASHBOARDS.values()
        for query in itertools.chain.from_iterable(panel.queries for panel in board.panels)
    ]
    assert [expression for expression in asked if prometheus.query(expression)] == []
