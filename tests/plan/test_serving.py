"""Laws of replicas: the queue is the textbook's, and one replica fewer would not do."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.errors import HeliostatError
from heliostat.hardware import find_machine
from heliostat.plan.fleet import Device, compose_fleet
from heliostat.plan.serving import (
    BUSIEST,
    REQUEST_SECONDS,
    Load,
    Served,
    Texts,
    plan_replicas,
    wait_quantile,
    wait_share,
)

GIB = 2**30
H100 = compose_fleet(find_machine("p5.48xlarge"), 1, "bf16", 1, 1).device
ROWS = Served(flops=1e6, weight_bytes=10**6)
# Llama 3 8B in bf16: 128 KiB a token.
LLAMA = Served(2 * 8.03e9, 16 * 10**9, 2 * 32 * 8 * 128 * 2)


def device(flops: float = 1e12, bandwidth: float = 1e12) -> Device:
    return Device("chip", flops, bandwidth, 1e9, 80 * GIB, 300, is_cpu=False)


def test_one_server_is_the_queue_of_every_textbook() -> None:
    """M/M/1: a request waits with the probability that the server is busy."""
    for work in (0.1, 0.5, 0.9):
        assert wait_share(1, work) == pytest.approx(work)


def test_many_servers_are_those_of_erlangs_table() -> None:
    """Erlang C of 2 and 10 servers, by the sum of its definition."""
    for servers, work in ((2, 1.0), (10, 8.0), (50, 45.0)):
        terms = [work**k / math.factorial(k) for k in range(servers)]
        last = work**servers / math.factorial(servers) * servers / (servers - work)
        assert wait_share(servers, work) == pytest.approx(last / (sum(terms) + last))


@given(st.integers(1, 200), st.floats(0.01, 0.99))
def test_waiting_is_a_share_that_more_servers_lower(servers: int, busy: float) -> None:
    work = servers * busy
    assert 0 <= wait_share(servers + 1, work) <= wait_share(servers, work) <= 1
    assert wait_quantile(servers + 1, work, 0.01) <= wait_quantile(servers, work, 0.01)


@given(st.floats(1, 1e5), st.floats(1.2, 50))
def test_one_replica_fewer_would_be_too_busy_or_too_slow(requests: float, slack: float) -> None:
    service = REQUEST_SECONDS + ROWS.flops / (device().flops * 0.4)
    target = slack * service
    found = plan_replicas(ROWS, Load(requests, target), device(), GIB, 32, 0.4)
    work = requests * service
    assert found.latency <= target
    assert work <= BUSIEST * found.count
    fewer = found.count - 1
    if fewer > work:
        slower = service + wait_quantile(fewer, work, service)
        assert slower > target or work > BUSIEST * fewer


@given(st.floats(0.1, 1000), st.integers(1, 4000), st.integers(1, 500))
def test_streams_fit_and_take_the_load(requests: float, prompt: int, new: int) -> None:
    texts = Texts(prompt, new)
    limit = int(70 * GIB)
    found = plan_replicas(LLAMA, Load(requests, None, texts), H100, limit, 256, 0.4)
    assert found.bytes <= limit
    assert 1 <= found.at_once <= 256
    assert found.most_requests >= requests


def test_a_token_of_one_stream_takes_as_long_as_its_weights_take_through_memory() -> None:
    """16 GB at 80 % of 3.35 TB/s: 6 ms, and one to launch it."""
    found = plan_replicas(LLAMA, Load(0.01, None, Texts(1, 1)), H100, 70 * GIB, 1, 0.4)
    assert found.latency == pytest.approx(0.001 + 16e9 / (0.8 * 3.35e12), rel=0.01)


def test_a_tighter_latency_leaves_fewer_streams_and_needs_more_replicas() -> None:
    texts = Texts(1000, 200)
    loose = plan_replicas(LLAMA, Load(50, 0.02, texts), H100, 70 * GIB, 256, 0.4)
    tight = plan_replicas(LLAMA, Load(50, 0.008, texts), H100, 70 * GIB, 256, 0.4)
    assert tight.at_once < loose.at_once
    assert tight.count > loose.count


@pytest.mark.parametrize(
    ("served", "load", "sentence"),
    [
        (ROWS, Load(1, 1e-6), "a request takes 0.403 ms on chip when nothing else does"),
        (LLAMA, Load(1, 1e-3, Texts(10, 10)), "a token takes 81.3 ms on chip for one stream alone"),
        (Served(1.0, 200 * GIB), Load(1, None), "a replica takes 200 GiB, 70 GiB can be used"),
    ],
)
def test_what_no_number_of_replicas_can_is_said(served: Served, load: Load, sentence: str) -> None:
    with pytest.raises(HeliostatError, match=sentence):
        plan_replicas(served, load, device(), 70 * GIB, 32, 0.4)
