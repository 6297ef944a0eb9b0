"""What a check makes of measured values, without a cluster: each fault is named, by its node."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.cluster.preflight.bucket import Rate, judge_bucket
from heliostat.cluster.preflight.clock import Offset, estimate_offset, judge_clocks
from heliostat.cluster.preflight.finding import (
    ASKER,
    CLUSTER,
    Finding,
    list_failed_nodes,
    sort_findings,
)
from heliostat.cluster.preflight.gpu import GIB, Gpu, Gpus, judge_gpus
from heliostat.cluster.preflight.guard import Guard, judge_guard, read_guard
from heliostat.cluster.preflight.links import (
    GB,
    Fabric,
    Speed,
    bus_rate,
    find_slow_nodes,
    judge_fabric,
    slowest,
)
from heliostat.cluster.preflight.room import Disk, Room, judge_room
from heliostat.cluster.preflight.rounds import cap_rounds, draw_rounds
from heliostat.cluster.preflight.sockets import Listener, judge_sockets
from heliostat.cluster.preflight.versions import TESTED, Versions, judge_versions
from heliostat.plan.fleet import LOOPBACK
from heliostat.plan.step import RING_SHARE

SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
VERSIONS = Versions("3.11.7", "2.60.0", "2.13.0", "0.1.0+abc", "2.36", "x86_64")
GUARD = Guard(SETTINGS, "/t", 0o600, ())
DISK = Disk("sessions and logs", "/tmp/ray", 100 * GIB, 50 * GIB)
ROOM = Room((DISK,), 16 * GIB, 8 * GIB, "/dev/shm", 32 * GIB, 16 * GIB, 65536)
# As an H100 in good health answered elsewhere; no GPU was asked for these tests.
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, 31, 87, 0, False, False, 0x1)
SPEED = Speed(10 * GB, 10 * GB, 10 * GB, 2e-5)


def wrong(findings: list[Finding]) -> set[tuple[str, str, str]]:
    """Node, check and level of what is not ok."""
    return {(one.node, one.check, one.level) for one in findings if one.level != "ok"}


def test_every_finding_that_is_not_ok_says_what_to_do() -> None:
    findings = [
        *judge_versions({"a": VERSIONS, "b": replace(VERSIONS, python="3.12.1"), "c": VERSIONS}),
        *judge_clocks({"a": Offset(5, 0.1), "b": Offset(0, 3)}, 1),
        *judge_guard({"a": Guard({}, "/t", None, ("AWS_SECRET_ACCESS_KEY",)), "b": GUARD}),
        *judge_sockets({"a": [Listener("gcs_server", "0.0.0.0", 1)]}, laptop=True),
        *judge_room({"a": Room((DISK,), 1, 2, "/tmp", GIB, 1, 100)}, 60, 1),
        *judge_bucket({"a": Rate(1, 1, 1)}, {"b": "no"}, 0.4),
        *judge_gpus({"a": Gpus((replace(H100, memory_errors=3),), 2, False, "")}),
        *judge_fabric(Fabric("gloo", {("a", "b"): None}, None, 2, 1), 0.4),
    ]
    assert len(wrong(findings)) > 12
    for finding in findings:
        assert bool(finding.advice) == (finding.level != "ok"), finding


def test_the_worst_comes_first_and_failed_nodes_are_listed_once() -> None:
    levels = ["ok", "warning", "failed", "ok", "failed"]
    findings = [Finding(str(i % 2), "", level, "") for i, level in enumerate(levels)]  # type: ignore[arg-type]
    findings += [Finding(CLUSTER, "", "failed", ""), Finding(ASKER, "", "failed", "")]
    ordered = sort_findings(findings)
    assert [one.level for one in ordered] == ["failed"] * 4 + ["warning", "ok", "ok"]
    assert list_failed_nodes(ordered) == ["0"]


# Versions


@pytest.mark.parametrize("name", ["python", "ray", "torch", "heliostat"])
def test_the_node_whose_version_differs_is_failed(name: str) -> None:
    other = replace(VERSIONS, **{name: "9.9.9"})
    for odd in "abc":
        found = {node: other if node == odd else VERSIONS for node in "abc"}
        assert wrong(judge_versions(found)) == {(odd, "versions", "failed")}


def test_of_two_nodes_that_which_was_not_tested_is_failed() -> None:
    found = {"a": replace(VERSIONS, ray="2.59.0"), "b": VERSIONS}
    assert wrong(judge_versions(found)) == {("a", "versions", "failed")}


def test_a_patch_of_python_counts() -> None:
    found = {node: VERSIONS for node in "ab"} | {"c": replace(VERSIONS, python="3.11.13")}
    (finding,) = [one for one in judge_versions(found) if one.level != "ok"]
    assert "3.11.13, most nodes have 3.11.7" in finding.measured


def test_what_all_have_and_nobody_tested_is_the_clusters() -> None:
    found = {node: replace(VERSIONS, ray="2.61.0", python="3.12.0") for node in "ab"}
    expected = {(CLUSTER, "versions", "failed"), (CLUSTER, "versions", "warning")}
    assert wrong(judge_versions(found)) == expected


def test_glibc_and_architecture_may_differ() -> None:
    assert not wrong(judge_versions({"a": VERSIONS, "b": replace(VERSIONS, glibc="2.39")}))


# Clocks


@given(st.floats(-100, 100), st.lists(st.tuples(st.floats(0, 2), st.floats(0, 2)), min_size=1))
def test_the_true_offset_lies_within_the_uncertainty(
    ahead: float, trips: list[tuple[float, float]]
) -> None:
    samples = [(1000.0, 1000.0 + there + ahead, 1000.0 + there + back) for there, back in trips]
    found = estimate_offset(samples)
    assert abs(found.seconds - ahead) <= found.uncertainty_seconds + 1e-6
    assert found.uncertainty_seconds <= min(map(sum, trips)) / 2 + 1e-6


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([0.0, 0.2], set()),
        ([0.0, 4.0], {("1", "failed")}),
        ([-4.0], {("0", "failed")}),
        ([0.1, 0.0, -3600.0], {("2", "failed")}),
        ([4.0, 4.1, 3.9], {(ASKER, "failed")}),
    ],
)
def test_the_clock_that_differs_from_most_is_failed(
    seconds: list[float], expected: set[tuple[str, str]]
) -> None:
    offsets = {str(i): Offset(value, 0.01) for i, value in enumerate(seconds)}
    found = wrong(judge_clocks(offsets, 1.0))
    assert {(node, level) for node, _, level in found} == expected


def test_an_answer_too_slow_to_tell_is_no_failure() -> None:
    assert wrong(judge_clocks({"a": Offset(0.5, 2.0)}, 1.0)) == {("a", "clock", "warning")}


# What guards a node


@pytest.mark.parametrize(
    ("name", "value", "level"),
    [
        ("RAY_AUTH_MODE", "disabled", "failed"),
        ("RAY_DASHBOARD_REDACT_RUNTIME_ENV", "0", "failed"),
        ("RAY_testing_rpc_failure", "*=5:25:25", "failed"),
        ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1", "failed"),
        ("RAY_TRAIN_V2_ENABLED", "0", "failed"),
        ("RAY_IGNORE_VERSION_MISMATCH", "True", "failed"),
        ("RAY_AUTH_TOKEN", "s3cret", "warning"),
        ("OMP_NUM_THREADS", "1", "warning"),
        ("RAY_SERVE_ENABLE_HA_PROXY", "0", "warning"),
        ("RAY_health_check_timeout_ms", "100", "warning"),
    ],
)
def test_a_dangerous_variable_is_named_and_no_secret_is(name: str, value: str, level: str) -> None:
    odd = read_guard({**SETTINGS, name: value, "RAY_AUTH_TOKEN_PATH": "/none"}, {})
    guards = {"a": replace(odd, token_mode=0o600), "b": GUARD, "c": GUARD}
    findings = [one for one in judge_guard(guards) if one.level != "ok"]
    assert [(one.node, one.level) for one in findings] == [("a", level)]
    assert name in findings[0].measured
    assert "s3cret" not in str(guards) + str(findings)


@pytest.mark.parametrize("name", ["RAY_testing_rpc_failure", "RAY_DEBUG", "OMP_NUM_THREADS"])
def test_a_variable_that_is_empty_or_harmless_is_none(name: str) -> None:
    for value in ("", "" if "rpc" in name else "8"):
        guard = read_guard({**SETTINGS, name: value, "RAY_AUTH_TOKEN_PATH": "/none"}, {})
        assert not wrong(judge_guard({"a": replace(guard, token_mode=0o600)}))


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_token_that_only_its_owner_reads_is_ok(mode: int) -> None:
    assert not wrong(judge_guard({"a": replace(GUARD, token_mode=mode)}))


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, None])
def test_a_token_that_others_read_or_that_is_not_there_is_failed(mode: int | None) -> None:
    found = judge_guard({"a": replace(GUARD, token_mode=mode), "b": GUARD})
    assert wrong(found) == {("a", "token", "failed")}


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MY_PASSWORD"])
def test_a_secret_given_to_a_job_is_named_and_not_told(name: str) -> None:
    given = {name: "canary", "PYTHONPATH": "x", "RAY_AUTH_TOKEN_PATH": "/t"}
    guard = replace(read_guard(SETTINGS, given), token_mode=0o600)
    (finding,) = judge_guard({"a": guard})
    assert (finding.level, guard.exposed) == ("failed", (name,))
    assert "canary" not in repr(guard)


# Ports


def test_what_is_open_fails_on_a_laptop_and_warns_where_it_asks_for_no_token() -> None:
    gcs, haproxy = Listener("gcs_server", "0.0.0.0", 6379), Listener("haproxy", "::", 8404)
    closed = [Listener(one.program, "127.0.0.1", one.port) for one in (gcs, haproxy)]
    for laptop in (True, False):
        assert not wrong(judge_sockets({"a": closed}, laptop))
    assert wrong(judge_sockets({"a": [gcs], "b": closed}, True)) == {("a", "ports", "failed")}
    assert not wrong(judge_sockets({"a": [gcs]}, False))
    assert wrong(judge_sockets({"a": [gcs, haproxy]}, False)) == {("a", "ports", "warning")}


# Room


@pytest.mark.parametrize(
    ("change", "check", "level"),
    [
        ({"disks": (replace(DISK, free_bytes=4 * GIB),)}, "disk for sessions and logs", "failed"),
        ({"disks": (DISK, Disk("spilled objects", "/s", 20 * GIB, GIB))},
         "disk for spilled objects", "failed"),
        ({"disks": (replace(DISK, total_bytes=2000 * GIB),)}, "disk for sessions and logs",
         "failed"),
        ({"memory_free_bytes": GIB}, "memory", "failed"),
        ({"shared_bytes": GIB // 16}, "object store", "failed"),
        ({"store_path": "/tmp"}, "object store", "warning"),
        ({"open_files": 1024}, "open files", "failed"),
        ({"open_files": 8192}, "open files", "warning"),
    ],
)  # fmt: skip
def test_what_is_too_small_is_named(change: dict[str, object], check: str, level: str) -> None:
    rooms = {"a": replace(ROOM, **change), "b": ROOM}  # type: ignore[arg-type]
    assert wrong(judge_room(rooms, 5, 0.5)) == {("a", check, level)}


# The bucket


def test_a_node_that_is_refused_or_slow_is_failed() -> None:
    usual = Rate(100e6, 200e6, 0.01)
    rates = {"a": usual, "b": replace(usual, read=50e6), "c": replace(usual, write=90e6)}
    found = judge_bucket(rates, {"d": "AccessDenied"}, 0.4)
    assert wrong(found) == {("b", "bucket", "failed"), ("d", "bucket", "failed")}
    assert not wrong(judge_bucket({"a": usual}, {}, 0.4))
    # Of two nobody knows which is ill.
    assert not wrong(judge_bucket({name: rates[name] for name in "ab"}, {}, 0.4))


# GPUs


@pytest.mark.parametrize(
    ("change", "level"),
    [
        ({"memory_errors": 2}, "failed"),
        ({"remap_pending": True}, "failed"),
        ({"remap_failed": True, "remap_pending": True}, "failed"),
        ({"celsius": 87}, "failed"),
        ({"celsius": 84}, "warning"),
        ({"event_reasons": 0x40}, "failed"),
        ({"event_reasons": 0x80 | 0x4}, "failed"),
        ({"memory_free_bytes": 40 * GIB}, "warning"),
    ],
)
def test_an_ill_gpu_is_named(change: dict[str, object], level: str) -> None:
    ill = replace(H100, **change)  # type: ignore[arg-type]
    found = judge_gpus({"a": Gpus((H100, ill), 2, False), "b": Gpus((H100,), 1, False)})
    assert wrong(found) == {("a", "GPU 1", level)}


@pytest.mark.parametrize("bits", [0x0, 0x1, 0x2, 0x4, 0x10, 0x100])
def test_an_idle_or_busy_gpu_is_not_ill(bits: int) -> None:
    assert not wrong(judge_gpus({"a": Gpus((replace(H100, event_reasons=bits),), 1, False)}))


def test_what_the_driver_does_not_tell_is_no_fault() -> None:
    bare = Gpu("T4", 15 * GIB, 15 * GIB)
    assert not wrong(judge_gpus({"a": Gpus((bare,), 1, False), "b": Gpus((), 0, False)}))


def test_memory_that_ray_lent_is_no_fault() -> None:
    used = replace(H100, memory_free_bytes=GIB)
    assert not wrong(judge_gpus({"a": Gpus((used,), 1, True)}))


def test_ray_and_the_driver_count_the_same() -> None:
    assert wrong(judge_gpus({"a": Gpus((H100,), 2, False)})) == {("a", "GPU", "failed")}
    assert wrong(judge_gpus({"a": Gpus((H100,), 0, False)})) == {("a", "GPU", "warning")}
    (told,) = judge_gpus({"a": Gpus((), 1, False, stands_in=True)})
    assert (told.level, told.measured[:16]) == ("ok", "none, 1 declared")
    broken = Gpus((), 0, False, "Driver/library version mismatch")
    assert wrong(judge_gpus({"a": broken})) == {("a", "GPU", "failed")}


# Rounds


@given(st.integers(0, 40))
def test_every_pair_meets_once_and_nobody_meets_two_in_a_round(count: int) -> None:
    names = [str(i) for i in range(count)]
    rounds = draw_rounds(names)
    met = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert sorted(map(sorted, met)) == sorted(map(sorted, combinations(names, 2)))
    for pairs in rounds:
        assert len({name for pair in pairs for name in pair}) == 2 * len(pairs)
    if count > 1:
        assert len(rounds) == (count - 1 if count % 2 == 0 else count)


@given(st.integers(2, 40), st.integers(1, 1000))
def test_capped_rounds_are_whole_and_few_enough(count: int, most: int) -> None:
    rounds = draw_rounds([str(i) for i in range(count)])
    kept = cap_rounds(rounds, most)
    assert kept == rounds[: len(kept)]
    assert sum(map(len, kept)) <= max(most, 3 * (count // 2))
    partners = Counter(name for pairs in kept for pair in pairs for name in pair)
    assert min(partners.values()) >= min(2, count - 1)
    if len(kept) < len(rounds):
        assert sum(map(len, rounds[: len(kept) + 1])) > most


# Links


def make_pairs(count: int, rate: Callable[[str, str], float]) -> dict[tuple[str, str], float]:
    return {pair: rate(*pair) for pair in combinations([str(i) for i in range(count)], 2)}


@given(st.integers(3, 20), st.data())
def test_the_slow_node_is_found_whoever_it_is(count: int, data: st.DataObject) -> None:
    bad = str(data.draw(st.integers(0, count - 1)))
    noise = st.floats(0.8, 1.2)
    rates = make_pairs(count, lambda a, b: data.draw(noise) * (1 if bad in (a, b) else 10))
    assert find_slow_nodes(rates, 0.4) == {bad}


@given(st.integers(1, 20), st.data())
def test_nobody_is_blamed_where_all_are_alike(count: int, data: st.DataObject) -> None:
    rates = make_pairs(count, lambda a, b: data.draw(st.floats(0.5, 1.2)))
    assert find_slow_nodes(rates, 0.4) == set()


def test_two_slow_nodes_of_six_are_found_in_three_rounds() -> None:
    kept = draw_rounds([str(i) for i in range(6)])[:3]
    rates = {pair: 1.0 if {"1", "4"} & {*pair} else 10.0 for pairs in kept for pair in pairs}
    assert find_slow_nodes(rates, 0.4) == {"1", "4"}


def make_fabric(count: int, rate: Callable[[str, str], float], **more: object) -> Fabric:
    pairs = {
        pair: Speed(value, value, value, 1e-4) if value else None
        for pair, value in make_pairs(count, rate).items()
    }
    fabric = Fabric("gloo", pairs, SPEED, count, len(pairs))
    return replace(fabric, **more)  # type: ignore[arg-type]


def test_a_slow_node_is_failed_and_its_partners_are_not() -> None:
    found = judge_fabric(make_fabric(4, lambda a, b: GB if "2" in (a, b) else 10 * GB), 0.4)
    assert wrong(found) == {("2", "network, gloo", "failed")}


def test_a_node_that_answers_no_partner_is_failed_alone() -> None:
    fabric = make_fabric(4, lambda a, b: 0 if "3" in (a, b) else GB, whole=None)
    found = wrong(judge_fabric(fabric, 0.4))
    assert found == {("3", "network, gloo", "failed"), (CLUSTER, "network, gloo", "failed")}


def test_a_slow_pair_of_nodes_that_are_fast_elsewhere_names_both() -> None:
    fabric = make_fabric(4, lambda a, b: GB if (a, b) == ("0", "1") else 10 * GB)
    found = judge_fabric(fabric, 0.4)
    assert {node for node, _, _ in wrong(found)} == {"0", "1"}
    assert {one.measured[:7] for one in found if one.level == "failed"} == {"with 0:", "with 1:"}


def test_of_two_nodes_that_do_not_meet_both_are_failed() -> None:
    found = wrong(judge_fabric(make_fabric(2, lambda a, b: 0, whole=None), 0.4))
    assert {node for node, _, _ in found} == {"0", "1", CLUSTER}


def test_all_together_are_held_against_what_a_plan_counts_on() -> None:
    expected = RING_SHARE * LOOPBACK
    for share, level in ((0.6, "ok"), (0.4, "warning")):
        speed = replace(SPEED, reduce=share * expected)
        fabric = make_fabric(2, lambda a, b: GB, whole=speed, place="loopback")
        (finding,) = judge_fabric(fabric, 0.4)
        assert (finding.node, finding.level) == (CLUSTER, level)


def test_nothing_is_expected_of_a_network_that_nobody_named() -> None:
    speed = replace(SPEED, reduce=1.0)
    assert not wrong(judge_fabric(make_fabric(2, lambda a, b: GB, whole=speed), 0.4))


@given(st.integers(2, 64), st.floats(1e6, 1e11))
def test_the_rate_of_the_bus_is_that_of_the_links_of_a_ring(ranks: int, link: float) -> None:
    """A ring takes n - 1 steps of S / n to gather and twice as many to reduce."""
    size_bytes = 1e8
    step = size_bytes / ranks / link
    assert bus_rate("gather", size_bytes, (ranks - 1) * step, ranks) == pytest.approx(link)
    assert bus_rate("reduce", size_bytes, 2 * (ranks - 1) * step, ranks) == pytest.approx(link)
    assert bus_rate("send", size_bytes, size_bytes / link, ranks) == pytest.approx(link)


def test_a_group_is_as_fast_as_its_slowest_and_nothing_without_one() -> None:
    slow = Speed(1, 2, 3, 4)
    assert slowest([SPEED, slow], 2) == slow
    assert slowest([SPEED], 2) is None


def test_the_tested_versions_are_those_that_are_pinned() -> None:
    from pathlib import Path

    pinned = (Path(__file__).parents[3] / "constraints.txt").read_text()
    for name in ("ray", "torch"):
        assert f"\n{name}=={TESTED[name]}\n" in pinned
    assert f"(Python {TESTED['python']})" in pinned
