"""Measure the platform beside its peers on this cluster; the last line is JSON.

eval "$(heliostat env)"
python jobs/benchmark.py data                       # bucket -> tensors, rows per second
python jobs/benchmark.py data root=s3://my-bucket repeats=5
python jobs/benchmark.py train                      # a step, submit to first step, kill to next
python jobs/benchmark.py train only=steps repeats=1
python jobs/benchmark.py gate                       # what keys, limits and metering cost a request
python jobs/benchmark.py serve                      # requests per second; starts its own cluster
python jobs/benchmark.py generate                   # tokens per second over HTTP; needs no cluster
"""

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import ray
import torch

from heliostat.benchmark import data, gate, generate, gpu, serve, train
from heliostat.errors import HeliostatError
from heliostat.job import run
from heliostat.spec import Positive, Section, parse_options


class Options(Section):
    root: str = "s3://heliostat"
    repeats: Positive = 3
    only: Literal["steps", "checkpoint", "submit", "kill"] | None = None


def measure_data(options: Options) -> dict[str, Any]:
    def report(name: str, reading: data.Reading) -> None:
        sustained = reading.sustained_rows_per_second
        print(
            f"{name:<16} {reading.rows_per_second:>9,.0f} rows/s  "
            f"first batch {reading.first_batch_seconds:.2f} s"
            + (f"  sustained {sustained:,.0f} rows/s" if sustained else ""),
            flush=True,
        )

    found = data.measure(options.root, options.repeats, report)
    if found["mosaicml"] is None:
        print("mosaicml   not installed: pip install mosaicml-streaming")
    ours = found["heliostat"]
    assert ours is not None
    return {
        "rows_per_second": {
            name: round(reading.rows_per_second) if reading else None
            for name, reading in found.items()
        },
        "sustained_rows_per_second": {
            name: round(reading.sustained_rows_per_second)
            for name, reading in found.items()
            if reading and reading.sustained_rows_per_second
        },
        "first_batch_seconds": round(ours.first_batch_seconds, 2),
    }


def measure_train(options: Options) -> dict[str, Any]:
    found = train.measure(options.root, options.repeats, options.only, partial(print, flush=True))
    for figure, peers in found.items():
        ours, theirs = peers.values()
        ratio = f"{ours / theirs:.2f}x" if ours and theirs else "-"
        shown = "  ".join(f"{name} {seconds or math.nan:.4f}" for name, seconds in peers.items())
        print(f"{figure:<30} {shown}  {ratio}")
    if not torch.cuda.is_available():
        print("mfu is null: this machine has no GPU")
    return {**found, "mfu": gpu.measure().mfu if torch.cuda.is_available() else None}


def measure_gate(options: Options) -> dict[str, Any]:
    found = gate.measure(options.repeats, partial(print, flush=True))
    return {"added_microseconds": {name: round(micros, 1) for name, micros in found.items()}}


def measure_serve(options: Options) -> dict[str, Any]:
    """Requests by case, then by server; null where one is not installed or has no such case."""
    found = serve.measure(options.repeats, partial(print, flush=True))
    print(
        f"{'case':<14} {'server':<14} {'requests/s':>10} {'ratio':>6} {'p50, ms':>8} {'p99, ms':>8}"
    )
    for case, outcomes in found.items():
        for name, outcome in outcomes.items():
            if outcome:
                reading = outcome.reading
                print(
                    f"{case:<14} {name:<14} {reading.requests_per_second:>10,.0f} "
                    f"{outcome.ratio:>6.2f} {reading.p50_ms:>8.2f} {reading.p99_ms:>8.2f}"
                )
    if None in (found["mlp_json"]["litserve"], found["mlp_json"]["bentoml"]):
        print("a peer that is null failed, as said above, or is not installed: `make peers`")
    alone = found.pop("one_connection")

    def tell(figure: str, digits: int | None = None) -> dict[str, dict[str, float | None]]:
        return {
            case: {
                name: None if outcome is None else round(getattr(outcome.reading, figure), digits)
                for name, outcome in outcomes.items()
            }
            for case, outcomes in found.items()
        }

    return {
        "requests_per_second": tell("requests_per_second"),
        "p99_ms": tell("p99_ms", 2),
        "p50_ms_one_connection": {
            name: round(outcome.reading.p50_ms, 3) for name, outcome in alone.items() if outcome
        },
    }


def measure_generate(options: Options) -> dict[str, Any]:
    """Both figures by streams, then by peer; null where a peer is not installed."""
    found = generate.measure(options.repeats, partial(print, flush=True))
    speeds, waits = dict[str, dict[str, int | None]](), dict[str, dict[str, float | None]]()
    print(f"{'streams':<8} {'peer':<13} {'tokens/s':>9} {'ratio':>6} {'ttft p50, ms':>13}")
    for streams in generate.STREAMS:
        speed, wait = speeds.setdefault(str(streams), {}), waits.setdefault(str(streams), {})
        for name, readings in found.readings.items():
            reading = readings and readings[streams]
            speed[name] = round(reading.tokens_per_second) if reading else None
            wait[name] = round(reading.ttft_ms, 1) if reading and reading.ttft_ms else None
            ratio = (speed["heliostat"] or math.nan) / (speed[name] or math.nan)
            print(f"{streams:<8} {name:<13} {speed[name]!s:>9} {ratio:>6.2f} {wait[name]!s:>13}")
    if found.readings["vllm"] is None:
        print("vllm is null: `make peers` installs its CPU build, in an environment of its own")
    if len(texts := found.texts) > 1:
        print(f"greedy texts of {', '.join(texts)} equal: {len({*texts.values()}) == 1}")
    startup = {name: s and round(s, 1) for name, s in found.startup_seconds.items()}
    return {"tokens_per_second": speeds, "ttft_ms_p50": waits, "startup_seconds": startup}


def on_ray(measure: Callable[[Options], dict[str, Any]]) -> Callable[[Options], dict[str, Any]]:
    def measure_there(options: Options) -> dict[str, Any]:
        ray.init(logging_level="ERROR", log_to_driver=False)
        return measure(options)

    return measure_there


BENCHMARKS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "data": on_ray(measure_data),
    "train": on_ray(measure_train),
    "serve": measure_serve,
    "generate": measure_generate,
    "gate": measure_gate,
}


def main(name: str, *overrides: str) -> None:
    if name not in BENCHMARKS:
        raise HeliostatError(f"{name!r} is no benchmark: use one of {', '.join(BENCHMARKS)}")
    options = parse_options(Options, overrides)
    print(json.dumps({"benchmark": name, **BENCHMARKS[name](options)}))


if __name__ == "__main__":
    run(main)
