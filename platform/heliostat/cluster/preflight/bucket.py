"""How fast a node reads and writes the bucket, and whether the bucket keeps to its conditions."""

import dataclasses
import secrets
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median, median_high

from heliostat import storage
from heliostat.cluster.preflight.finding import Finding
from heliostat.errors import HeliostatError
from heliostat.storage import QUICK, S3Store, Store

MB = 10**6
OBJECT_BYTES = 8 * 2**20
OBJECTS = 4
QUESTIONS = 5


@dataclass(frozen=True)
class Rate:
    """Bytes/s with OBJECTS requests at a time, and the seconds of a request for nearly nothing."""

    write: float
    read: float
    latency_seconds: float


def measure_bucket(store: Store) -> Rate:
    """Write and read OBJECTS objects in `store`, which is empty again afterwards.

    Raises:
        HeliostatError: it cannot be reached, refuses, or ignores conditional writes.
    """
    storage.probe(store)
    try:
        return _measure(store)
    finally:
        empty(store)


def empty(store: Store) -> bool:
    """Remove all that is in `store`; whether that could be done."""
    quick = dataclasses.replace(store, retry=QUICK) if isinstance(store, S3Store) else store
    try:
        for entry in quick.list():
            quick.delete(entry.key)
    except HeliostatError:
        return False
    return True


def _measure(store: Store) -> Rate:
    data = secrets.token_bytes(OBJECT_BYTES)
    keys = [f"{secrets.token_hex(8)}.check" for _ in range(OBJECTS)]
    with ThreadPoolExecutor(OBJECTS) as threads:
        began = time.monotonic()
        list(threads.map(lambda key: store.write(key, data), keys))
        written = time.monotonic()
        total = sum(map(len, threads.map(store.read, keys)))
        read = time.monotonic()
    assert total == OBJECTS * OBJECT_BYTES
    return Rate(total / (written - began), total / (read - written), _measure_latency(store, keys))


def judge_bucket(
    rates: Mapping[str, Rate], refusals: Mapping[str, str], slow_share: float
) -> list[Finding]:
    """A node that cannot use the bucket is failed, and of three or more one much slower than most.

    Of two that differ nobody knows which is ill.
    """
    findings = [
        Finding(
            node, "bucket", "failed", reason, "give this node the way and the rights to the bucket"
        )
        for node, reason in refusals.items()
    ]
    for node, rate in rates.items():
        slow = [
            f"{verb} {value / MB:,.0f} MB/s, most nodes {usual / MB:,.0f}"
            for verb, value, usual in (
                ("writes", rate.write, median_high(one.write for one in rates.values())),
                ("reads", rate.read, median_high(one.read for one in rates.values())),
            )
            if value < slow_share * usual and len(rates) > 2
        ]
        if slow:
            advice = "look at the network of this node, or train without it"
            findings.append(Finding(node, "bucket", "failed", "; ".join(slow), advice))
        else:
            findings.append(Finding(node, "bucket", "ok", _describe(rate)))
    return findings


def _measure_latency(store: Store, keys: list[str]) -> float:
    seconds = []
    for turn in range(QUESTIONS):
        began = time.monotonic()
        store.stat(keys[turn % len(keys)])
        seconds.append(time.monotonic() - began)
    return median(seconds)


def _describe(rate: Rate) -> str:
    return (
        f"writes {rate.write / MB:,.0f} MB/s, reads {rate.read / MB:,.0f} MB/s, "
        f"{rate.latency_seconds * 1e3:.1f} ms a request, conditional writes hold"
    )
