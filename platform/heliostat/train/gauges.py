"""Training metrics to Prometheus: gauges of Ray, which every node of the cluster exports."""

from collections.abc import Sequence

from ray.util.metrics import Gauge

from heliostat.metrics import RUN, STEP, TRAINING, Sample


class Gauges:
    """A sink of `metrics.emit` for a process of a Ray cluster."""

    def __init__(self, run: str):
        self._run = {RUN: run}
        self._gauges = {
            metric.name: Gauge(
                metric.exported, metric.help, (RUN, metric.label) if metric.label else (RUN,)
            )
            for metric in TRAINING.values()
        }

    def __call__(self, step: int, samples: Sequence[Sample]) -> None:
        self._gauges[STEP.name].set(step, self._run)
        for sample in samples:
            label = {sample.metric.label: sample.at} if sample.metric.label else {}
            self._gauges[sample.metric.name].set(sample.value, {**self._run, **label})
