"""`heliostat plan`: what a run will take, before any machine is rented."""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, TypeVar

from heliostat.cli.options import (
    Commands,
    add_command,
    add_json,
    load_cluster,
    open_store,
)
from heliostat.cli.output import render_table
from heliostat.errors import HeliostatError
from heliostat.quantity import as_quantity, as_seconds

if TYPE_CHECKING:
    from heliostat.data.expected import Rows
    from heliostat.hardware import Machine
    from heliostat.plan import Model, Plan, Serving
    from heliostat.plan.bill import Volume
    from heliostat.spec import RunSpec
    from heliostat.storage import Store

MAX_REMEDIES = 3
# What --on is called for the cluster that runs.
CLUSTER = "cluster"
NOBODY = "no machine of the table can: ask for one with --on, which says why it cannot"
AnyPlan = TypeVar("AnyPlan", "Plan", "Serving")


def add_commands(commands: Commands) -> None:
    command = add_command(
        commands,
        "plan",
        plan,
        "memory, time, network, storage, money and energy of a run, before it is started",
        [
            "heliostat plan jobs/specs/sotu_gpt.yaml",
            "heliostat plan llama8b.yaml --on p5.48xlarge --tokens 15e12",
            "heliostat plan llama8b.yaml --on p4d.24xlarge train.strategy=fsdp train.workers=64",
            "heliostat plan llama8b.yaml --requests-per-second 20 --latency-ms 30",
        ],
    )
    command.add_argument("spec", metavar="SPEC", help="the spec of a run")
    command.add_argument("settings", nargs="*", metavar="key=value", help="changes of the spec")
    command.add_argument(
        "--on",
        metavar="MACHINE",
        help="a machine of the table, FILE.yaml: the description of a cluster, or `cluster`: the "
        "one that runs (default: all of the table)",
    )
    command.add_argument("--rows", type=_number, help="rows of an epoch, where none are prepared")
    command.add_argument("--tokens", type=_number, help="what the run is trained on in all")
    load = command.add_argument_group("instead of training it, serving it")
    load.add_argument("--requests-per-second", type=_positive, metavar="N", help="the load")
    load.add_argument(
        "--latency-ms", type=_positive, metavar="MS", help="for 95 %% of them; a token"
    )
    load.add_argument("--prompt-tokens", type=_number, default=512, metavar="N", help="(512)")
    load.add_argument("--new-tokens", type=_number, default=128, metavar="N", help="(128)")
    command.add_argument("--utilisation", type=_share, help="of the peak FLOP/s, 0 to 1")
    command.add_argument("--pue", type=_pue, default=1.15, help="of the data centre (1.15)")
    add_json(command)


def plan(options: argparse.Namespace) -> int:
    from heliostat import spec as specs
    from heliostat.train.foresee import foresee, foresee_volume

    spec = specs.load(options.spec, tuple(options.settings))
    if options.latency_ms and not options.requests_per_second:
        raise HeliostatError("--latency-ms is of a load: give --requests-per-second")
    machine = _find_machine(spec, options)  # before anything else imports Ray
    rows = _find_rows(spec, options)
    if options.requests_per_second:
        return _plan_serving(spec, rows, machine, options)
    model = foresee(spec, rows)
    volume = foresee_volume(spec, rows, model, options.tokens)
    plans = _make_plans(model, spec, volume, machine, options)
    if not plans:
        raise HeliostatError(NOBODY)
    if options.json:
        print(json.dumps([_to_json(one) for one in plans]))
    else:
        described = _describe(plans[0]) if options.on else _compare(plans)
        print("\n".join([*_describe_model(model, spec), "", *described, *_advise(plans)]))
    return 0 if any(one.room.fits for one in plans) else 2


def _plan_serving(
    spec: "RunSpec", rows: "Rows", machine: "Machine | None", options: argparse.Namespace
) -> int:
    from heliostat.plan import plan_serving
    from heliostat.plan.serving import Load, Texts
    from heliostat.train.foresee import find_served_precision, foresee_served

    served, precision = foresee_served(spec, rows), find_served_precision(spec)
    texts = Texts(options.prompt_tokens, options.new_tokens)
    context = spec.deploy.max_context or spec.data.text.block
    if served.cache_bytes_per_token and texts.context > context:
        raise HeliostatError(
            f"a text of {texts.prompt:,} + {texts.new:,} tokens exceeds the {context:,} that are "
            "served: lower --prompt-tokens or --new-tokens, or set deploy.max_context"
        )
    load = Load(
        options.requests_per_second,
        options.latency_ms and options.latency_ms / 1000,
        texts if served.cache_bytes_per_token else None,
    )

    def make(machine: "Machine") -> "Serving":
        return plan_serving(
            served, load, spec.deploy, machine, precision, options.utilisation, options.pue
        )

    found = _on_machines(make, machine)
    if not found:
        raise HeliostatError(NOBODY)
    if options.json:
        print(json.dumps([asdict(one) for one in found]))
    else:
        print("\n".join(_list_servings(found, bool(load.texts))))
    return 0


def _on_machines(make: "Callable[[Machine], AnyPlan]", asked: "Machine | None") -> "list[AnyPlan]":
    """What is planned on the machine `asked` for, or on all of the table that can."""
    from heliostat.plan.fleet import list_machines

    if asked:
        return [make(asked)]
    plans = []
    for machine in list_machines():
        with suppress(HeliostatError):
            plans.append(make(machine))
    return plans


def _find_machine(spec: "RunSpec", options: argparse.Namespace) -> "Machine | None":
    """That of --on: by its name, of a description's training pool, or of the cluster that runs,
    which RAY_ADDRESS names, or else the laptop's."""
    import logging
    import os

    from heliostat import hardware, local

    if (options.on or "").endswith((".yaml", ".yml")):
        return hardware.find_machine(load_cluster(options.on, ()).training.machine)
    if options.on != CLUSTER:
        return hardware.find_machine(options.on) if options.on else None

    if "RAY_ADDRESS" not in os.environ:
        cluster = local.find(local.locate(options.home))
        if cluster is None:
            raise HeliostatError(
                f"--on {CLUSTER}: no cluster runs here and RAY_ADDRESS names none: start one with "
                "`heliostat up` or name a machine of the table"
            )
        os.environ.update(cluster.env)
    import ray  # reads this process's environment

    from heliostat.train.site import find_machine

    ray.init(logging_level=logging.ERROR, log_to_driver=False)
    return find_machine(spec.train)


def _make_plans(
    model: "Model",
    spec: "RunSpec",
    volume: "Volume",
    machine: "Machine | None",
    options: argparse.Namespace,
) -> "list[Plan]":
    from heliostat.plan import Assumptions, correct_plan, make_plan
    from heliostat.plan.calibration import load, name_hardware

    assumed, store = Assumptions(options.utilisation, options.pue), _find_store(spec, options)

    def make(machine: "Machine") -> "Plan":
        plan = make_plan(model, spec.train, volume, machine, assumed)
        return correct_plan(plan, load(store, name_hardware(machine))) if store else plan

    return _on_machines(make, machine)


def _find_store(spec: "RunSpec", options: argparse.Namespace) -> "Store | None":
    """Where earlier runs lie, if it can be reached from here."""
    with suppress(HeliostatError):
        store = open_store(argparse.Namespace(root=spec.root, home=options.home))
        next(store.list("calibration/"), None)
        return store
    return None


def _advise(plans: "list[Plan]") -> Iterator[str]:
    """Where nothing fits, what would make it, on the three cheapest machines that can."""
    from heliostat.plan import find_machine_that_fits, find_remedy

    if any(plan.room.fits for plan in plans):
        return
    by_price = sorted(plans, key=lambda plan: plan.fleet.machine.usd_per_hour)
    remedies = ((plan, find_remedy(plan)) for plan in by_price)
    found = [(plan, remedy) for plan, remedy in remedies if remedy]
    lines = [f"  --on {plan.fleet.machine.name} {remedy}" for plan, remedy in found[:MAX_REMEDIES]]
    if len(plans) == 1 and (other := find_machine_that_fits(plans[0])):
        lines.append(f"  --on {other.name}")
    yield ""
    yield "It does not fit. It would with:" if lines else "It fits no machine of the table."
    yield from lines


def _number(text: str) -> int:
    """`15e12` as well as `1000`."""
    value = _read(text)
    if not 1 <= value < 1e18 or value % 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 to 1e18")
    return int(value)


def _read(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _pue(text: str) -> float:
    value = _read(text)
    if not 1 <= value < 10:
        raise argparse.ArgumentTypeError(f"{text} is no PUE: it is at least 1")
    return value


def _positive(text: str) -> float:
    value = _read(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value


def _share(text: str) -> float:
    value = _read(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share above 0 and up to 1")
    return value


def _find_rows(spec: "RunSpec", options: argparse.Namespace) -> "Rows":
    """Those that are prepared, or those that the spec foretells."""
    from heliostat.data.expected import expect_rows, read_rows

    with suppress(HeliostatError):
        expected = expect_rows(spec)
        return replace(expected, count=options.rows or expected.count)
    from heliostat.data.prepare import require_prepared

    open_store(argparse.Namespace(root=spec.root, home=options.home))
    return read_rows(require_prepared(spec))


def _describe_model(model: "Model", spec: "RunSpec") -> Iterator[str]:
    per_token = f" ({model.tokens_per_row:,} tokens)" if model.tokens_per_row > 1 else ""
    yield (
        f"{model.name}: {spec.model.kind}, {model.parameters:,} parameters, "
        f"{as_quantity(model.flops_per_row, 'FLOP')} for a row{per_token}, forward and backward"
    )
    train = spec.train
    yield (
        f"{train.most_workers} workers, {train.strategy}, {train.precision}, global_batch "
        f"{train.global_batch:,}, {train.optimizer.kind}" + ", recompute" * train.recompute
    )


def _describe(plan: "Plan") -> Iterator[str]:
    fleet, step, bill, volume = plan.fleet, plan.step, plan.bill, plan.volume
    yield (
        f"on {fleet.machines} x {fleet.machine.name} ({fleet.device.name}, {fleet.workers} workers)"
    )
    yield ""
    rows = [(p.name, as_quantity(p.value, p.unit), p.reason, p.source) for p in plan.room.parts]
    rows.append(("total", as_quantity(plan.room.bytes, "B"), _say_fit(plan), ""))
    yield render_table(("memory of a worker", "", "why", "source"), rows)
    yield ""
    overlap = f"{as_seconds(step.exchange)} of exchange, all but this is hidden by computing"
    yield render_table(
        ("step", "", "why", "source"),
        [
            ("compute", as_seconds(step.compute), f"{plan.utilisation.value:.0%} of "
             f"{as_quantity(fleet.device.flops, 'FLOP/s')}: {plan.utilisation.reason}",
             plan.utilisation.source),
            ("update", as_seconds(step.update), "weights, gradients and moments through memory",
             "roofline (Williams et al. 2009)"),
            ("exchange", as_seconds(step.exposed), overlap, "a ring (Patarasuk & Yuan 2009)"),
            *_list_corrections(plan),
            ("step", as_seconds(step.seconds),
             f"{plan.train.global_batch * plan.model.tokens_per_row / step.seconds:,.0f} "
             f"{'tokens' if plan.model.tokens_per_row > 1 else 'rows'}/s", ""),
        ],
    )  # fmt: skip
    yield ""
    yield render_table(
        ("run", "", "why"),
        [
            ("network", as_quantity(step.sent_bytes, "B"),
             "through the busiest link in a step; below "
             f"{as_quantity(step.least_network, 'B/s')} it bounds the step, there are "
             f"{as_quantity(fleet.ring_rate, 'B/s')}"),
            ("storage", as_quantity(bill.stored_bytes, "B"), "the data and "
             f"{volume.kept_checkpoints + 1} checkpoints of "
             f"{as_quantity(volume.checkpoint_bytes, 'B')}"),
            ("reading", as_quantity(bill.read_bytes_per_second, "B/s"), "to keep the workers busy"),
            ("checkpoint", as_seconds(bill.checkpoint_seconds), "to be away, beside the steps"),
            ("time", f"{bill.hours:,.2f} h", f"{bill.steps:,} steps"),
            ("money", *_say_price(plan)),
            ("energy", f"{bill.kwh:,.2f} kWh", "full load, and what the data centre adds (PUE)"),
        ],
    )  # fmt: skip


def _list_corrections(plan: "Plan") -> Iterator[tuple[str, str, str, str]]:
    factor = plan.assumed.correction.step
    if factor.runs:
        what = f"what a step took, of what it was planned to, {factor.say_runs()}"
        yield "correction", f"x {factor.value:.2f}", what, "calibration/ in the bucket"


def _say_price(plan: "Plan") -> tuple[str, str]:
    bill, machine = plan.bill, plan.fleet.machine
    if not machine.usd_per_hour:
        return (
            "not known",
            f"{bill.machine_hours:,.1f} machine-hours; it is not in the table",
        )
    spot = f", ${bill.usd_spot:,.2f} on spot" if bill.usd_spot else ""
    price = f"${machine.usd_per_hour:,.2f} ({machine.priced})"
    return f"${bill.usd:,.2f}", f"{bill.machine_hours:,.1f} machine-hours at {price}{spot}"


def _compare(plans: "list[Plan]") -> Iterator[str]:
    fitting = [plan for plan in plans if plan.room.fits]
    cheapest = min(fitting, key=lambda plan: plan.bill.usd, default=None)
    fastest = min(fitting, key=lambda plan: plan.bill.hours, default=None)
    rows = []
    for plan in sorted(plans, key=lambda plan: (not plan.room.fits, plan.bill.usd)):
        bill, fleet = plan.bill, plan.fleet
        marks = [name for name, one in (("cheapest", cheapest), ("fastest", fastest))
                 if one is plan]  # fmt: skip
        rows.append(
            (
                f"{fleet.machines} x {fleet.machine.name}",
                fleet.device.name,
                f"{as_quantity(plan.room.bytes, 'B')} of {as_quantity(plan.room.limit_bytes, 'B')}",
                *(
                    (f"{plan.room.rows:,}", as_seconds(plan.step.seconds), f"{bill.hours:,.2f}",
                     f"{bill.usd:,.2f}", f"{bill.usd_spot:,.2f}" if bill.usd_spot else "",
                     f"{bill.kwh:,.2f}", " ".join(marks))
                    if plan.room.fits
                    else ("does not fit", "", "", "", "", "", "")
                ),
            )
        )  # fmt: skip
    yield render_table(
        ("machines", "worker", "memory", "micro_batch", "step", "hours", "USD", "spot", "kWh", ""),
        rows,
    )


def _list_servings(servings: "list[Serving]", streams: bool) -> Iterator[str]:
    rows = []
    for one in sorted(servings, key=lambda one: one.usd_per_hour):
        fleet, found = one.fleet, one.replicas
        rows.append(
            (
                f"{fleet.machines} x {fleet.machine.name}",
                fleet.device.name,
                f"{found.count:,}",
                *((f"{found.at_once:,}",) if streams else ()),
                f"{as_quantity(found.bytes, 'B')} of {as_quantity(one.limit_bytes, 'B')}",
                as_seconds(found.latency),
                f"{found.most_requests:,.4g}",
                f"{one.usd_per_hour:,.2f}",
                f"{730 * one.usd_per_hour:,.0f}",
                f"{one.kwh_per_hour:,.2f}",
            )
        )
    own = ("streams",) if streams else ()
    latency = "a token" if streams else "95 % in"
    costs = ("requests/s", "USD/h", "USD/month", "kW")
    header = ("machines", "each on", "replicas", *own, "memory", latency, *costs)
    yield render_table(header, rows)


def _say_fit(plan: "Plan") -> str:
    if not plan.room.fits:
        return f"does not fit: {as_quantity(plan.room.limit_bytes, 'B')} can be used"
    spare = 1 - plan.room.bytes / plan.fleet.device.memory_bytes
    return f"fits with {spare:.0%} spare, {plan.room.most_rows:,} rows would at most"


def _to_json(plan: "Plan") -> dict[str, object]:
    return {
        "machine": plan.fleet.machine.name,
        "machines": plan.fleet.machines,
        "workers": plan.fleet.workers,
        "fits": plan.room.fits,
        "micro_batch": plan.room.rows,
        "most_rows": plan.room.most_rows,
        "parameters": plan.model.parameters,
        "memory": [asdict(part) for part in plan.room.parts],
        "memory_bytes": plan.room.bytes,
        "limit_bytes": plan.room.limit_bytes,
        "utilisation": asdict(plan.utilisation),
        "step": asdict(plan.step) | {"seconds": plan.step.seconds},
        "run": asdict(plan.bill),
        "correction": asdict(plan.assumed.correction),
    }
