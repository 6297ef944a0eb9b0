"""Grafana dashboards as values: panels of the metrics in the table, rendered to JSON."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliostat.metrics import (
    GOODPUT,
    GOODPUT_BOUND,
    GRAD_NORM,
    LEARNING_RATE,
    LOSS,
    MFU,
    RUN,
    SAMPLES,
    SCORE,
    STALL_SHARE,
    STEP,
    TOKENS,
    VALIDATION,
    WAIT_SHARE,
    Metric,
)

COLUMNS = 24
PANEL_COLUMNS, PANEL_ROWS = 8, 8
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Query:
    """PromQL, and how Grafana names what it gives: `{{label}}` stands for a label's value."""

    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """Curves over time; `unit` is what Grafana calls it, `stacked` curves are parts of a whole."""

    title: str
    help: str
    unit: str
    queries: Sequence[Query]
    stacked: bool = False
    logarithmic: bool = False


@dataclass(frozen=True)
class Dashboard:
    """Panels for the runs that are chosen at its top; `uid` is its address in Grafana."""

    uid: str
    title: str
    panels: Sequence[Panel]


def select(metric: Metric, name: str = "", /, **matched: str) -> Query:
    """The curve of each chosen run, one for each value of the metric's label; named `name`.

    A worker that ended is exported a while longer, so two may tell of one run: the most counts.
    """
    labels = [RUN] if metric.label is None or metric.label in matched else [RUN, metric.label]
    conditions = [f'{RUN}=~"$run"', *(f'{key}="{value}"' for key, value in matched.items())]
    legend = " ".join(["{{run}}", name, *(f"{{{{{label}}}}}" for label in labels[1:])])
    return Query(
        f"max by ({', '.join(labels)}) ({metric.scraped}{{{', '.join(conditions)}}})",
        " ".join(legend.split()),
    )


def chart(metric: Metric, title: str, logarithmic: bool = False) -> Panel:
    """The panel of one metric."""
    return Panel(title, metric.help, metric.unit, [select(metric)], logarithmic=logarithmic)


TRAINING = Dashboard(
    "heliostat-training",
    "Heliostat: training",
    [
        Panel(
            "Loss",
            "Of the training batches, and of each pass over the validation split",
            LOSS.unit,
            [select(LOSS, "training"), select(VALIDATION, "validation", metric="loss")],
        ),
        Panel(
            "Scores",
            "What the task counts, on the training batches and on the validation split",
            SCORE.unit,
            [select(SCORE, "training"), select(VALIDATION, "validation")],
        ),
        chart(STEP, "Step"),
        chart(SAMPLES, "Rows a second"),
        chart(TOKENS, "Tokens a second"),
        chart(MFU, "Model FLOPs utilisation"),
        chart(LEARNING_RATE, "Learning rate"),
        chart(GRAD_NORM, "Gradient norm", logarithmic=True),
        Panel(
            "Stalls",
            "Shares of the time in which the loop waited",
            WAIT_SHARE.unit,
            [select(WAIT_SHARE, "data"), select(STALL_SHARE, "checkpoint")],
        ),
        Panel("Time by class", GOODPUT.help, GOODPUT.unit, [select(GOODPUT)], stacked=True),
        Panel(
            "Goodput",
            "Share of all seconds in which steps were made for the first time, and its bound",
            GOODPUT_BOUND.unit,
            [
                Query(
                    f"{select(GOODPUT, **{'class': 'productive'}).expression} / "
                    f"sum by ({RUN}) ({select(GOODPUT).expression})",
                    "{{run}}",
                ),
                select(GOODPUT_BOUND, "bound"),
            ],
        ),
    ],
)

DASHBOARDS = {"training.json": TRAINING}


def render(dashboard: Dashboard) -> str:
    """The dashboard as Grafana imports it."""
    document = {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["heliostat"],
        "schemaVersion": 41,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": list(_variables())},
        "panels": [
            _render_panel(number, panel) for number, panel in enumerate(dashboard.panels, start=1)
        ],
    }
    return json.dumps(document, indent=2) + "\n"


def _variables() -> Iterator[dict[str, Any]]:
    yield {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    yield {
        "name": RUN,
        "label": "Run",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": f"label_values({STEP.scraped}, {RUN})", "refId": "runs"},
        "refresh": 2,
        "sort": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _render_panel(number: int, panel: Panel) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": SOURCE,
        "gridPos": _place(number - 1),
        "fieldConfig": {"defaults": _render_fields(panel), "overrides": []},
        "options": {
            "legend": {
                "displayMode": "list",
                "placement": "bottom",
                "showLegend": True,
                "calcs": ["lastNotNull"],
            },
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": SOURCE,
                "expr": query.expression,
                "legendFormat": query.legend,
                "range": True,
            }
            for place, query in enumerate(panel.queries)
        ],
    }


def _render_fields(panel: Panel) -> dict[str, Any]:
    scale = {"type": "log", "log": 10} if panel.logarithmic else {"type": "linear"}
    stacking = {"group": "A", "mode": "normal" if panel.stacked else "none"}
    return {
        "unit": panel.unit,
        "custom": {
            "drawStyle": "line",
            "fillOpacity": 40 if panel.stacked else 0,
            "showPoints": "auto",
            "scaleDistribution": scale,
            "stacking": stacking,
        },
    }


def _place(place: int) -> dict[str, int]:
    """Panels fill rows of three, from the left."""
    row, column = divmod(place, COLUMNS // PANEL_COLUMNS)
    return {
        "x": column * PANEL_COLUMNS,
        "y": row * PANEL_ROWS,
        "w": PANEL_COLUMNS,
        "h": PANEL_ROWS,
    }


def write(folder: Path) -> list[Path]:
    """Render every dashboard into `folder`; the files that were written."""
    paths = [folder / name for name in DASHBOARDS]
    for path, dashboard in zip(paths, DASHBOARDS.values(), strict=True):
        path.write_text(render(dashboard))
    return paths


if __name__ == "__main__":
    print(*write(Path(sys.argv[1])), sep="\n")
