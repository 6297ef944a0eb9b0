"""How long a step takes: computing, updating weights, and what of the exchange is not hidden."""

from dataclasses import dataclass, replace

from heliostat.plan.fleet import Fleet
from heliostat.plan.memory import FLOAT, WIDTHS, Footprint, Layout

# By their GPU-hours the runs of Llama 2 (A100) and of Llama 3.1 405B (H100) reached 35 to 43 %, and
# those of Megatron-LM 43 to 52 %, recomputation counted as work.
UTILISATION = 0.4
LLAMA = "Touvron et al. 2023, table 2; Grattafiori et al. 2024, table 4; Narayanan et al. 2021"
# Of a link's rate, what a ring reaches with large messages: 231 of 300 GB/s among 8 A100.
RING_SHARE = 0.75
RING_LATENCY_SECONDS = 30e-6
MEMORY_SHARE = 0.8
# To launch an operation from Python, whatever it computes; compiled networks launch few.
LAUNCH_SECONDS = 8e-6
# The backward pass is two thirds of a step, and gradients travel while it goes on.
HIDDEN_SHARE = {"ddp": 2 / 3, "fsdp": 1.0}
RING = "a ring: Patarasuk & Yuan 2009; nccl-tests, PERFORMANCE.md"


@dataclass(frozen=True)
class Work:
    """What a step does over all workers: FLOPs of the model for one row, forward and backward.

    `recomputes` adds the forward pass once more, which is a third of both.
    """

    flops_per_row: float
    global_batch: int
    micro_batch: int
    recomputes: bool
    compiles: bool


@dataclass(frozen=True)
class Step:
    """Seconds of a step, and the bytes that each machine sends in it."""

    compute: float
    update: float
    exchange: float
    exposed: float
    sent_bytes: float
    hidden_seconds: float

    @property
    def seconds(self) -> float:
        return self.compute + self.update + self.exposed

    def scale(self, factor: float) -> "Step":
        """The same step, all of it so much longer."""
        return replace(
            self,
            compute=factor * self.compute,
            update=factor * self.update,
            exposed=factor * self.exposed,
        )

    @property
    def least_network(self) -> float:
        """Bytes/s below which the exchange is not hidden any more; 0 if nothing is sent."""
        return self.sent_bytes / (RING_SHARE * self.hidden_seconds) if self.hidden_seconds else 0.0


def estimate_step(
    work: Work, footprint: Footprint, layout: Layout, fleet: Fleet, utilisation: float
) -> Step:
    """Rows are shared evenly; the slowest worker has one more where they do not divide.

    What is launched from Python takes its time however little it computes. A ring over n workers
    moves 2 (n - 1) / n of what is reduced through each link, and half of that of what is gathered
    or scattered. FSDP gathers weights for the forward and the backward pass of each micro batch
    and scatters float32 gradients once.
    """
    rows = -(-work.global_batch // layout.workers)
    passes = -(-rows // work.micro_batch)
    flops = rows * work.flops_per_row * (4 / 3 if work.recomputes else 1)
    launched = 0.0 if work.compiles else passes * footprint.kernels * LAUNCH_SECONDS
    compute = max(flops / (fleet.device.flops * utilisation), launched)
    share = layout.workers if layout.strategy == "fsdp" else 1
    touched = (2 * footprint.weights + footprint.gradients + 2 * footprint.optimizer) / share
    update = touched / (MEMORY_SHARE * fleet.device.bandwidth)
    sent = _count_sent(footprint, layout, passes)
    exchange = 0.0
    if layout.workers > 1:
        latency = 2 * (layout.workers - 1) * RING_LATENCY_SECONDS
        exchange = sent / (RING_SHARE * fleet.ring_rate) + latency
    hidden = HIDDEN_SHARE[layout.strategy] * compute
    if layout.strategy == "ddp":
        hidden /= passes  # gradients travel with the last micro batch alone
    exposed = max(0.0, exchange - hidden)
    return Step(compute, update, exchange, exposed, sent, hidden)


def _count_sent(footprint: Footprint, layout: Layout, passes: int) -> float:
    """Bytes through the busiest link of the ring in one step."""
    n = layout.workers
    if layout.strategy == "ddp":
        return 2 * (n - 1) / n * footprint.gradients
    gathered = footprint.gradients * WIDTHS[layout.precision] / FLOAT
    return (n - 1) / n * (2 * passes * gathered + footprint.gradients)
