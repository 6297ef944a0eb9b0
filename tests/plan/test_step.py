"""Laws of time, network and money: what more of anything can do to a step and a run."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from heliostat.errors import HeliostatError
from heliostat.hardware import ACCELERATORS, MACHINES, Machine
from heliostat.plan import Model, find_machine_that_fits, find_remedy, make_plan
from heliostat.plan.bill import Volume, add_up, count_watts
from heliostat.plan.figure import Figure
from heliostat.plan.fleet import compose_fleet, find_machine, list_machines
from heliostat.plan.memory import Footprint, Layout, Line
from heliostat.plan.step import RING_SHARE, Step, Work, estimate_step
from heliostat.spec import TrainSpec

GIB = 2**30
NOTHING = Figure("framework", 0, "B", "", "")
LINES = (Line(0, GIB),)
FOOTPRINT = Footprint(4 * GIB, 4 * GIB, 8 * GIB, 0, GIB // 2, GIB, 1000, LINES, LINES, LINES)
A100 = find_machine("p4d.24xlarge")
VOLUME = Volume(steps=1000, rows=10_000, row_bytes=100, checkpoint_bytes=GIB, kept_checkpoints=2)


def step_of(
    workers: int, strategy: str = "ddp", machine: Machine = A100, micro_batch: int = 64
) -> Step:
    fleet = compose_fleet(machine, workers, "fp32", 1, 1)
    layout = Layout(strategy, "fp32", workers, accumulates=False, overhead=NOTHING)
    work = Work(1e12, 1024, micro_batch, recomputes=False, compiles=True)
    return estimate_step(work, FOOTPRINT, layout, fleet, 0.4)


def model_of(footprint: Footprint) -> Model:
    return Model("m", footprint.weights // 4, 1e9, 1, lambda recompute: footprint)


def test_a_ring_moves_what_the_formula_says() -> None:
    gradients = FOOTPRINT.gradients
    assert step_of(8).sent_bytes == 2 * 7 / 8 * gradients
    assert step_of(8, "fsdp", micro_batch=128).sent_bytes == 7 / 8 * 3 * gradients
    assert step_of(8, "fsdp", micro_batch=64).sent_bytes == 7 / 8 * 5 * gradients
    assert step_of(1).sent_bytes == step_of(1).exchange == 0


@given(st.integers(1, 512), st.integers(1, 512))
def test_more_workers_compute_no_longer(few: int, more: int) -> None:
    few, more = sorted((few, more))
    assert step_of(more).compute <= step_of(few).compute


@given(st.integers(9, 512), st.floats(1e8, 1e12))
def test_below_the_least_network_the_exchange_shows(workers: int, rate: float) -> None:
    step = step_of(workers, machine=replace(A100, network=rate))
    latency = step.exchange - step.sent_bytes / (RING_SHARE * rate)
    assume(abs(rate - step.least_network) > 0.01 * rate)
    if rate < step.least_network:
        assert step.exposed > 0
    elif latency < 0.01 * step.hidden_seconds:
        assert step.exposed <= latency


def test_launching_bounds_a_small_step() -> None:
    fleet = compose_fleet(A100, 1, "fp32", 1, 1)
    layout = Layout("ddp", "fp32", 1, accumulates=False, overhead=NOTHING)
    work = Work(1.0, 8, 4, recomputes=False, compiles=False)
    assert estimate_step(work, FOOTPRINT, layout, fleet, 0.4).compute > 2 * 1000 * 1e-6
    compiled = replace(work, compiles=True)
    assert estimate_step(compiled, FOOTPRINT, layout, fleet, 0.4).compute < 1e-9


def test_recomputation_is_a_third_more() -> None:
    plain = step_of(8).compute
    fleet = compose_fleet(A100, 8, "fp32", 1, 1)
    layout = Layout("ddp", "fp32", 8, accumulates=False, overhead=NOTHING)
    work = Work(1e12, 1024, 64, recomputes=True, compiles=True)
    again = estimate_step(work, FOOTPRINT, layout, fleet, 0.4).compute
    assert again == pytest.approx(4 / 3 * plain)


def test_a_bill_is_hours_times_machines() -> None:
    fleet, step = compose_fleet(A100, 20, "fp32", 1, 1), step_of(20)
    bill = add_up(VOLUME, step, 1024, fleet, pue=1.5)
    assert fleet.machines == 3
    assert bill.hours == pytest.approx((60 + 1000 * step.seconds) / 3600)
    assert bill.usd == pytest.approx(3 * bill.hours * A100.usd_per_hour)
    assert bill.kwh == pytest.approx(3 * bill.hours * count_watts(fleet) * 1.5 / 1000)
    assert bill.stored_bytes == 10_000 * 100 + 3 * GIB


def test_what_does_not_fit_says_with_what_it_would() -> None:
    train = TrainSpec(workers=8, global_batch=64, gpus_per_worker=1)
    plan = make_plan(model_of(FOOTPRINT), train, VOLUME, find_machine("g5.12xlarge"))
    assert not plan.room.fits
    remedy = find_remedy(plan)
    assert remedy is not None
    changed = {key.removeprefix("train."): value for key, _, value in
               (setting.partition("=") for setting in remedy.split())}  # fmt: skip
    assert changed["micro_batch"] == "auto"
    other = find_machine_that_fits(plan)
    assert other is not None
    assert make_plan(model_of(FOOTPRINT), train, VOLUME, other).room.fits


@pytest.mark.parametrize("micro_batch", [None, "auto", 1, 3])
def test_the_micro_batch_is_what_was_asked_for_or_the_largest(micro_batch: object) -> None:
    train = TrainSpec(workers=2, gpus_per_worker=1, global_batch=64, micro_batch=micro_batch)  # type: ignore[arg-type]
    plan = make_plan(model_of(FOOTPRINT), train, VOLUME, A100)
    asked = {None: 0, "auto": plan.room.most_rows}.get(micro_batch, micro_batch)  # type: ignore[call-overload]
    assert plan.room.rows == asked  # all of 32 rows do not fit 40 GiB
    assert plan.room.most_rows < 32


def test_a_fleet_has_the_machines_that_its_workers_need() -> None:
    cpu = find_machine("m7i.4xlarge")
    fleet = compose_fleet(cpu, 10, "fp32", 4, 0)
    assert (fleet.per_machine, fleet.machines) == (4, 3)
    assert fleet.device.memory_bytes == cpu.memory_bytes // 4
    with pytest.raises(HeliostatError, match=r"17 CPUs and 0 GPUs, m7i\.4xlarge has 16 and 0"):
        compose_fleet(cpu, 1, "fp32", 17, 0)


def test_workers_that_want_gpus_get_as_many_machines() -> None:
    four = find_machine("g5.12xlarge")
    assert compose_fleet(four, 4, "fp32", 1, 4).machines == 4
    assert compose_fleet(four, 4, "fp32", 1, 1).machines == 1
    assert compose_fleet(four, 4, "fp32", 24, 1).machines == 2
    with pytest.raises(HeliostatError, match=r"wants 0 GPUs, g5\.12xlarge has 4 x A10G"):
        compose_fleet(four, 1, "fp32", 1, 0)
    with pytest.raises(HeliostatError, match=r"wants 1 GPUs, m7i\.4xlarge has no GPU"):
        compose_fleet(find_machine("m7i.4xlarge"), 1, "fp32", 1, 1)


def test_what_a_machine_cannot_do_is_said() -> None:
    with pytest.raises(HeliostatError, match="T4 does not compute in bf16, only in fp32, fp16"):
        compose_fleet(find_machine("g4dn.xlarge"), 1, "bf16", 1, 1)
    with pytest.raises(HeliostatError, match=r"there is no machine 'p9'.*use one of m7i\.2xlarge"):
        find_machine("p9")


def test_every_machine_has_its_accelerator_in_the_table() -> None:
    names = {accelerator.name for accelerator in ACCELERATORS}
    assert {machine.accelerator for machine in MACHINES} - {None} <= names
    for machine in list_machines():
        gpus = min(machine.accelerators, 1)
        assert compose_fleet(machine, 1, "fp32", 1, gpus).per_machine >= 1
    prices = [machine.usd_per_hour for machine in list_machines()]
    assert prices == sorted(prices)
    assert all(m.spot_usd_per_hour is None or m.spot_usd_per_hour < m.usd_per_hour
               for m in MACHINES)  # fmt: skip
