"""How far the clock of a node is off, estimated over the round trip of a question."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_high, median_low

from heliostat.cluster.preflight.finding import ASKER, Finding

ADVICE = "set it and keep it set (`timedatectl set-ntp true`): leases and keys expire by it"


@dataclass(frozen=True)
class Offset:
    """Seconds that a clock is ahead of the asker's, right to within the uncertainty."""

    seconds: float
    uncertainty_seconds: float


def estimate_offset(samples: Sequence[tuple[float, float, float]]) -> Offset:
    """From (sent, theirs, received), the first and last by the asker's clock: the answer was given
    some time between them, so half of the shortest round trip is the uncertainty (RFC 5905, 8)."""
    sent, theirs, received = min(samples, key=lambda sample: sample[2] - sample[0])
    return Offset(theirs - (sent + received) / 2, (received - sent) / 2)


def judge_clocks(offsets: Mapping[str, Offset], limit_seconds: float) -> list[Finding]:
    """Against what most clocks say, the asker's among them, so that one that is off is named."""
    seconds = sorted([0.0, *(offset.seconds for offset in offsets.values())])
    usual = min(median_low(seconds), median_high(seconds), key=abs)
    clocks = {ASKER: Offset(0.0, 0.0), **offsets}
    findings = [_judge_one(node, off, usual, limit_seconds) for node, off in clocks.items()]
    return [one for one in findings if one.node != ASKER or one.level != "ok"]


def _judge_one(node: str, offset: Offset, usual: float, limit_seconds: float) -> Finding:
    """What the uncertainty can explain is no failure, but no proof of a right clock either."""
    off, unsure = offset.seconds - usual, offset.uncertainty_seconds
    measured = f"{off:+.3f} s from most clocks, +-{unsure:.3f} s"
    if abs(off) - unsure > limit_seconds:
        return Finding(node, "clock", "failed", measured, ADVICE)
    if abs(off) + unsure > limit_seconds:
        advice = "the answer took too long to tell: check again when the node is less busy"
        return Finding(node, "clock", "warning", measured, advice)
    return Finding(node, "clock", "ok", measured)
