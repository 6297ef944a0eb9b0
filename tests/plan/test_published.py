"""Plans beside what was published of runs that took place; each figure with its source."""

from functools import cache

import pytest

from heliostat.hardware import ACCELERATORS, find_machine
from heliostat.models.cost import measure_cost
from heliostat.plan.bill import Volume, add_up
from heliostat.plan.figure import Figure
from heliostat.plan.fleet import compose_fleet
from heliostat.plan.memory import Footprint, Layout, Line
from heliostat.plan.step import Work, estimate_step
from heliostat.signature import Blocks, NextToken, Signature
from heliostat.spec import GptSpec

NOTHING = Figure("framework", 0, "B", "", "")
PEAK = {accelerator.name: accelerator.flops["bf16"] for accelerator in ACCELERATORS
        if "bf16" in accelerator.flops}  # fmt: skip
# Layers, width, heads, heads of keys, width of the feed-forward layer, vocabulary, tokens of a
# block: of the papers and of the configurations that were published with the weights. GPT-3 and
# Megatron's largest have a feed-forward layer of two matrices of 4 widths: three of 8/3 are as many
# weights.
SHAPES = {
    "gpt-3": (96, 12_288, 96, 96, 32_768, 50_257, 2048),
    "megatron-1t": (128, 25_600, 160, 160, 68_267, 51_200, 2048),
    "llama-2-7b": (32, 4096, 32, 32, 11_008, 32_000, 4096),
    "llama-2-13b": (40, 5120, 40, 40, 13_824, 32_000, 4096),
    "llama-2-34b": (48, 8192, 64, 8, 22_016, 32_000, 4096),
    "llama-2-70b": (80, 8192, 64, 8, 28_672, 32_000, 4096),
    "llama-3.1-8b": (32, 4096, 32, 8, 14_336, 128_256, 8192),
    "llama-3.1-70b": (80, 8192, 64, 8, 28_672, 128_256, 8192),
    "llama-3.1-405b": (126, 16_384, 128, 8, 53_248, 128_256, 8192),
}


@cache
def measure(name: str) -> tuple[int, float]:
    """Parameters, and training FLOPs of a token.

    Layers are alike, so two of them tell what the others cost.
    """
    layers, *_ = SHAPES[name]
    (few, few_flops), (more, more_flops) = (_measure_layers(name, number) for number in (1, 2))
    others = layers - 1
    return few + others * (more - few), few_flops + others * (more_flops - few_flops)


def _measure_layers(name: str, layers: int) -> tuple[int, float]:
    _, width, heads, kv_heads, ffn, vocab, block = SHAPES[name]
    tied = not name.startswith("llama")
    shape = GptSpec(
        kind="gpt", layers=layers, width=width, heads=heads, kv_heads=kv_heads, ffn=ffn, tied=tied
    )
    cost = measure_cost(shape, Signature(Blocks(block, vocab, 0), NextToken()))
    return cost.parameters, cost.train_flops_per_sample / block


def plan_hours(name: str, machine: str, chips: int, tokens: float, utilisation: float) -> float:
    """Hours of `chips` of them all; the exchange is part of the utilisation that is given."""
    fleet = compose_fleet(find_machine(machine), chips, "bf16", 1, 1)
    block = SHAPES[name][-1]
    nothing = Footprint(0, 0, 0, 0, 0, 0, 0, *((Line(0, 0),),) * 3)
    batch = 1024 * chips
    work = Work(measure(name)[1] * block, batch, 1024, recomputes=False, compiles=True)
    layout = Layout("ddp", "bf16", chips, accumulates=False, overhead=NOTHING)
    step = estimate_step(work, nothing, layout, fleet, utilisation)
    steps = round(tokens / (batch * block))
    return add_up(Volume(steps, 0, 0, 0, 0), step, batch, fleet, pue=1).hours * chips


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # what the files of the published weights hold
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
    ],
)
def test_parameters_are_those_that_were_published(name: str, parameters: int) -> None:
    assert measure(name)[0] == parameters


def test_flops_of_gpt_3_are_those_of_its_paper() -> None:
    """3.14e23 on 300 B tokens (Brown et al. 2020, table D.1), which leaves attention out."""
    assert measure("gpt-3")[1] * 300e9 == pytest.approx(3.14e23, rel=0.03)


def test_flops_are_six_for_each_parameter_and_those_of_attention() -> None:
    """6N + 12LHQT (Chowdhery et al. 2022, appendix B), N without the table of embeddings."""
    layers, width, _, _, _, vocab, block = SHAPES["llama-3.1-70b"]
    parameters, flops = measure("llama-3.1-70b")
    multiplied = parameters - vocab * width
    assert flops == pytest.approx(6 * multiplied + 12 * layers * width * block, rel=0.001)


@pytest.mark.parametrize(
    ("name", "machine", "tokens", "hours"),
    [  # Touvron et al. 2023, table 2, and the model cards of Llama 2 and 3.1
        ("llama-2-7b", "p4de.24xlarge", 2.0e12, 184_320),
        ("llama-2-13b", "p4de.24xlarge", 2.0e12, 368_640),
        ("llama-2-34b", "p4de.24xlarge", 2.0e12, 1_038_336),
        ("llama-2-70b", "p4de.24xlarge", 2.0e12, 1_720_320),
        ("llama-3.1-405b", "p5.48xlarge", 15.6e12, 30_840_000),
    ],
)
def test_gpu_hours_are_those_that_were_published(
    name: str, machine: str, tokens: float, hours: int
) -> None:
    """At 40 %: Llama 3.1 states 38 to 43 (Grattafiori et al. 2024, table 4), Llama 2 nothing."""
    assert plan_hours(name, machine, 1024, tokens, 0.4) == pytest.approx(hours, rel=0.25)


@pytest.mark.parametrize(
    ("name", "chips", "tflops", "tokens", "days"),
    [("gpt-3", 1024, 140, 300e9, 34), ("megatron-1t", 3072, 163, 450e9, 84)],
)
def test_days_are_those_of_megatron(
    name: str, chips: int, tflops: float, tokens: float, days: float
) -> None:
    """At the FLOP/s of a chip that it states, a fourth of them for recomputation.

    Narayanan et al. 2021, section 5.1.
    """
    utilisation = 3 / 4 * tflops * 1e12 / PEAK["A100 80GB"]
    hours = plan_hours(name, "p4de.24xlarge", chips, tokens, utilisation)
    assert hours / chips / 24 == pytest.approx(days, rel=0.05)
