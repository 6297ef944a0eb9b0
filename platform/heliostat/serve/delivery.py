"""Whether a candidate takes over: pure functions of what became of the requests so far."""

import math
from dataclasses import dataclass, field, replace

from heliostat.spec import CandidateSpec

LEAST_SECONDS, RATIO, SLOTS = 1e-4, 1.1, 150  # 0.1 ms to 147 s, 10 % apart
CONFIDENCE = 1.645  # one-sided 95 %, in standard deviations
EARLY_SHARE = 0.5  # of the requests wanted, after which latencies are compared


@dataclass(frozen=True)
class Tally:
    """What became of requests: failures are answers 5xx and none at all, `slots` the latencies.

    `compared` counts the answers that were held beside those of the served version, `different`
    those that are further from them than was allowed, `difference` is the largest.
    """

    requests: int = 0
    failures: int = 0
    slots: tuple[int, ...] = field(default=(0,) * SLOTS)
    compared: int = 0
    different: int = 0
    difference: float = 0.0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.requests + other.requests,
            self.failures + other.failures,
            tuple(map(sum, zip(self.slots, other.slots, strict=True))),
            self.compared + other.compared,
            self.different + other.different,
            max(self.difference, other.difference),
        )

    def quantile(self, share: float) -> float:
        """Seconds within which `share` of the requests were answered, to 10 %; 0 of none."""
        wanted, seen = share * sum(self.slots), 0
        for slot, count in enumerate(self.slots):
            seen += count
            if count and seen >= wanted:
                return LEAST_SECONDS * RATIO**slot
        return 0.0


def tally(failed: bool, seconds: float) -> Tally:
    """One request."""
    slots = [0] * SLOTS
    slots[find_slot(seconds)] = 1
    return Tally(1, int(failed), tuple(slots))


def find_slot(seconds: float) -> int:
    """Where a latency is counted."""
    slot = math.ceil(math.log(max(seconds, LEAST_SECONDS) / LEAST_SECONDS) / math.log(RATIO))
    return min(slot, SLOTS - 1)


def compare(one: Tally, difference: float, rule: CandidateSpec) -> Tally:
    """`one` request whose answer was held beside that of the served version."""
    too_far = rule.max_difference is not None and difference > rule.max_difference
    return replace(one, compared=1, different=int(too_far), difference=difference)


@dataclass(frozen=True)
class Wait:
    """Too little is known yet."""


@dataclass(frozen=True)
class Promote:
    """The candidate is as good."""


@dataclass(frozen=True)
class TakeBack:
    """The candidate is worse, or nobody asked it."""

    reason: str


Verdict = Wait | Promote | TakeBack


def judge(rule: CandidateSpec, served: Tally, candidate: Tally, seconds: float) -> Verdict:
    """What to do `seconds` after the candidate could be asked.

    It is taken back as soon as a bound is surely broken, and promoted not before `min_requests`.
    """
    limit = max(rule.max_error_share, _share(served.failures, served.requests))
    if surely_above(candidate.failures, candidate.requests) > limit:
        return TakeBack(
            f"{candidate.failures} of {candidate.requests} requests failed, of the version served "
            f"{served.failures} of {served.requests}"
        )
    if surely_above(candidate.different, candidate.compared) > 0:
        return TakeBack(
            f"{candidate.different} of {candidate.compared} answers differ, by up to "
            f"{candidate.difference:.3g}"
        )
    early = EARLY_SHARE * rule.min_requests
    slowest, slow = candidate.quantile(0.95), served.quantile(0.95)
    if min(candidate.requests, served.requests) >= early and (
        slowest > rule.max_latency_ratio * slow
    ):
        return TakeBack(
            f"95 % are answered within {1000 * slowest:.1f} ms, of the version served within "
            f"{1000 * slow:.1f} ms"
        )
    if candidate.requests >= rule.min_requests:
        return Promote()
    if seconds > rule.timeout_s:
        return TakeBack(
            f"{candidate.requests} of {rule.min_requests} requests came in {rule.timeout_s:g} s"
        )
    return Wait()


def surely_above(count: int, total: int) -> float:
    """The share that `count` of `total` shows with 95 % confidence; 0 of none.

    The lower end of the score interval, Wilson 1927.
    """
    if not count:
        return 0.0
    share, z = count / total, CONFIDENCE
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return (centre - spread) / (1 + z * z / total)


def _share(count: int, total: int) -> float:
    return count / total if total else 0.0
