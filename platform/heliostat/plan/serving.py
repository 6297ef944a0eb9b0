"""How many replicas a load needs, and what one of them holds and how soon it answers."""

import math
from dataclasses import dataclass

from heliostat.errors import HeliostatError
from heliostat.plan.fleet import Device
from heliostat.plan.step import MEMORY_SHARE

# What a request costs a replica besides its network, seconds of a core: measured with the MLP of
# `jobs/benchmark.py serve`, keys, limits and HTTP included.
REQUEST_SECONDS = 0.0004
# To schedule, launch and sample one step of all streams, whatever it computes.
STEP_SECONDS = 0.001
QUANTILE = 0.95
BUSIEST = 0.8  # the share of its time that a replica works at most: the rest is for peaks
MOST_REPLICAS = 100_000


@dataclass(frozen=True)
class Texts:
    """What a language model continues: each request's prompt and what follows it, in tokens."""

    prompt: int
    new: int

    @property
    def context(self) -> int:
        return self.prompt + self.new


@dataclass(frozen=True)
class Load:
    """Requests in a second, and the seconds in which 95 % of them are to be answered.

    Of texts `latency` is what a token may take on average; None where any time is well.
    """

    requests: float
    latency: float | None
    texts: Texts | None = None


@dataclass(frozen=True)
class Served:
    """A model as it is served: forward FLOPs of a row or a token, and bytes of its weights.

    `cache_bytes_per_token` are those of keys and values: 2 x layers x KV heads x their width x the
    bytes of a number (Pope et al. 2022, section 2.2); 0 for what answers rows.
    """

    flops: float
    weight_bytes: int
    cache_bytes_per_token: int = 0


@dataclass(frozen=True)
class Replicas:
    """How many, and of each: the streams or rows at once, its bytes, and what is answered.

    `latency` is the 95th percentile of a request, or the mean of a token; `most_requests` what
    all of them could take in a second.
    """

    count: int
    at_once: int
    bytes: int
    latency: float
    most_requests: float


def plan_replicas(
    served: Served, load: Load, device: Device, limit: int, streams: int, utilisation: float
) -> Replicas:
    """The fewest replicas of one `device` each that take the load.

    Raises:
        HeliostatError: the model does not fit `limit` bytes, or no number of them is fast enough.
    """
    if load.texts:
        return _plan_streams(served, load, load.texts, device, limit, streams, utilisation)
    return _plan_rows(served, load, device, limit, utilisation)


def wait_share(servers: int, work: float) -> float:
    """The share of requests that wait for one of `servers`, `work` of which are busy on average.

    Erlang C, from Erlang B by recursion, so that no factorial overflows (Cooper 1981, section 3.4).
    """
    if work >= servers:
        return 1.0
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = work * blocked / (number + work * blocked)
    return blocked / (1 - work / servers * (1 - blocked))


def wait_quantile(servers: int, work: float, service: float, share: float = QUANTILE) -> float:
    """Seconds that `share` of the requests wait no longer than, in an M/M/c queue."""
    waiting = wait_share(servers, work)
    if waiting <= 1 - share:
        return 0.0
    return math.log(waiting / (1 - share)) * service / (servers - work)


def _plan_rows(
    served: Served, load: Load, device: Device, limit: int, utilisation: float
) -> Replicas:
    _check_room(served.weight_bytes, limit)
    service = REQUEST_SECONDS + max(
        served.flops / (device.flops * utilisation),
        served.weight_bytes / (MEMORY_SHARE * device.bandwidth),
    )
    if load.latency is not None and service > load.latency:
        raise HeliostatError(
            f"a request takes {1000 * service:.3g} ms on {device.name} when nothing else does, "
            f"{1000 * load.latency:g} ms are allowed: take a faster machine or a smaller model"
        )
    work = load.requests * service
    count = _check_count(max(1, math.ceil(work / BUSIEST)))
    while service + wait_quantile(count, work, service) > (load.latency or math.inf):
        count += 1
    latency = service + wait_quantile(count, work, service)
    return Replicas(count, 1, served.weight_bytes, latency, count * BUSIEST / service)


def _plan_streams(
    served: Served,
    load: Load,
    texts: Texts,
    device: Device,
    limit: int,
    streams: int,
    utilisation: float,
) -> Replicas:
    """As many streams at once as fit and as the latency of a token allows.

    A step reads all weights and the keys and values of each stream, or computes as long as that
    takes (roofline: Williams et al. 2009); a prompt is computed once, between steps.
    """
    cache = texts.context * served.cache_bytes_per_token
    _check_room(served.weight_bytes + cache, limit)
    fitting = min(streams, (limit - served.weight_bytes) // max(cache, 1))

    def token(at_once: int) -> float:
        read = served.weight_bytes + at_once * cache
        return STEP_SECONDS + max(
            read / (MEMORY_SHARE * device.bandwidth),
            at_once * served.flops / (device.flops * utilisation),
        )

    prompt = texts.prompt * served.flops / (device.flops * utilisation)

    def latency(at_once: int) -> float:
        """Of a token on average: the prompts of the others come between."""
        return at_once * prompt / texts.new + token(at_once)

    at_once = fitting
    if load.latency is not None:
        at_once = next((n for n in range(fitting, 0, -1) if latency(n) <= load.latency), 0)
    if not at_once:
        raise HeliostatError(
            f"a token takes {1000 * latency(1):.3g} ms on {device.name} for one stream alone, "
            f"{1000 * (load.latency or 0):g} ms are allowed: take a device with faster memory"
        )
    each = at_once / (texts.new * latency(at_once))
    count = _check_count(max(1, math.ceil(load.requests / (each * BUSIEST))))
    bytes_held = served.weight_bytes + at_once * cache
    return Replicas(count, at_once, bytes_held, latency(at_once), count * each * BUSIEST)


def _check_count(count: int) -> int:
    if count > MOST_REPLICAS:
        raise HeliostatError(
            f"the load needs more than {MOST_REPLICAS:,} replicas: take a faster machine"
        )
    return count


def _check_room(needed: int, limit: int) -> None:
    if needed > limit:
        raise HeliostatError(
            f"a replica takes {needed / 2**30:.3g} GiB, {limit / 2**30:.3g} GiB can be used: take "
            "a device with more memory"
        )
