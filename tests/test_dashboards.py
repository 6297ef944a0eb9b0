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
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import nn

from heliostat import dashboards, local, storage
from heliostat.dashboards import DASHBOARDS, Dashboard, Query
from heliostat.metrics import TRAINING
from heliostat.models.tasks import choose_task
from heliostat.signature import Classes, Signature, Vector
from heliostat.train import goodput, loop
from heliostat.train.gauges import Gauges
from heliostat.train.goodput import CHECKPOINT, Ledger
from heliostat.train.progress import Progress, Workload

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


class Trainee:
    """A run that is cut off at step 60 and resumed from its checkpoint of step 40."""

    def train(self, root: str, run: str) -> str:
        self._attempt(root, run, range(60))
        return self._attempt(root, run, range(40, 150))

    def _attempt(self, root: str, run: str, steps: range) -> str:
        torch.set_num_threads(1)
        store = storage.connect(root)
        signature = Signature(Vector(256), Classes(("a", "b", "c")))
        model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 3))
        ledger = Ledger("job", goodput.load_attempts(store, run))
        weights = sum(parameter.numel() for parameter in model.parameters())
        workload = Workload(150, 50, row_tokens=1, row_flops=6 * weights, peak_flops=1e12)
        progress = Progress(
            store, run, workload, ledger, live=[Gauges(run)], first_step=steps.start
        )
        for report in loop.fit(
            model,
            choose_task(signature),
            torch.optim.SGD(model.parameters()),
            (make_batch(step) for step in steps),
            loop.Recipe(rate=lambda step: 0.01),
            first_step=steps.start,
        ):
            progress.add(report)
            if report.step % 40 == 0:
                with ledger.spend(CHECKPOINT):
                    progress.record()
                progress.add_validation(report.metrics)
        progress.finish()
        return ledger.total.render()


def make_batch(step: int) -> loop.Batch:
    generator = torch.Generator().manual_seed(step)
    rows = torch.randn(256, 256, generator=generator)
    return loop.Batch((rows,), rows[:, :3].argmax(dim=1), 0, 256, 256)


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
def run(
    cluster: local.Cluster, prometheus: Prometheus, wait_until: Callable[..., None]
) -> Iterator[str]:
    """The name of a run that Prometheus has scraped; its process lives as long as it is asked."""
    ray.init(ignore_reinit_error=True, logging_level="ERROR", log_to_driver=False)
    trainee = ray.remote(Trainee).remote()
    name = "shown-by-grafana"
    print(ray.get(trainee.train.remote(f"{cluster.root}/dashboards", name)))
    wait_until(lambda: prometheus.query(f'ray_heliostat_train_step{{run="{name}"}} == 150'), 90)
    yield name
    ray.kill(trainee)


@pytest.mark.cluster
@pytest.mark.parametrize("query", QUERIES)
def test_a_real_run_answers_every_query(prometheus: Prometheus, run: str, query: Query) -> None:
    values = prometheus.query(query.expression.replace("$run", run))
    assert any(values), f"{query.expression} gives {values[:3]}"


@pytest.mark.cluster
def test_a_query_for_another_run_gives_nothing(prometheus: Prometheus, run: str) -> None:
    """Without this the law above could hold for queries that do not look at the run."""
    asked = [
        query.expression.replace("$run", f"no-{run}")
        for board in DASHBOARDS.values()
        for query in itertools.chain.from_iterable(panel.queries for panel in board.panels)
    ]
    assert [expression for expression in asked if prometheus.query(expression)] == []
