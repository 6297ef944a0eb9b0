"""How much of a GPU a training step of a GPT uses: the real loop on made-up tokens, no Ray."""

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from heliostat.hardware import peak_flops
from heliostat.models import build, count_parameters, task_of
from heliostat.signature import Blocks, NextToken, Signature
from heliostat.spec import GptSpec, OptimizerSpec, TrainSpec
from heliostat.train import loop
from heliostat.train.mfu import count_token_flops, mfu
from heliostat.train.micro_batch import fit_micro_batch
from heliostat.train.optim import build_optimizer
from heliostat.train.parallel import parallelize

# About 0.8 B parameters, the shape of MosaicML's 760M with a SwiGLU: heads of 128.
GPT = GptSpec(kind="gpt", layers=24, width=1536, heads=12)
LENGTH, VOCAB = 2048, 32_768
TRAIN = TrainSpec(
    global_batch=16,
    micro_batch="auto",
    optimizer=OptimizerSpec(kind="adamw", lr=3e-4, weight_decay=0.1, decay="matrices"),
    clip_norm=1.0,
    precision="bf16",
    compile=True,
)
WARM_STEPS, BLOCKS = 5, 64


@dataclass(frozen=True)
class Speed:
    """The median of the steady steps; `mfu` is None where the device's peak is not known."""

    device: str
    torch: str
    parameters: int
    micro_batch: int
    global_batch: int
    step_seconds: float
    tokens_per_second: float
    token_flops: int
    mfu: float | None
    peak_bytes: int


def measure(
    model: GptSpec = GPT,
    train: TrainSpec = TRAIN,
    *,
    length: int = LENGTH,
    vocab: int = VOCAB,
    steps: int = 20,
    device: torch.device | None = None,
) -> Speed:
    """Train on one device for `steps` steps after the first ones, in which kernels are compiled."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blocks = Blocks(length, vocab, end=0)
    signature = Signature(blocks, NextToken())
    torch.manual_seed(train.seed)
    network = build(model, signature)
    parameters = count_parameters(network)
    embedding = 0 if model.tied else vocab * model.width
    token_flops = count_token_flops(parameters - embedding, model.layers, model.width, length)
    parallel = parallelize(network, task_of(model, signature), train, device)
    optimizer = build_optimizer(train.optimizer, network)
    if train.micro_batch == "auto":
        found = fit_micro_batch(parallel, optimizer, signature, train, device)
        print(found, flush=True)
        rows = found.rows
    else:
        rows = train.micro_batch or train.global_batch
    recipe = loop.Recipe(
        lambda step: train.optimizer.lr,
        micro_batch=rows,
        clip_norm=train.clip_norm,
        autocast=parallel.autocast,
        scaler=parallel.scaler,
    )
    batches = itertools.islice(
        _make_batches(blocks, train.global_batch, device), WARM_STEPS + steps
    )
    seconds = []
    for report in loop.fit(parallel.model, parallel.task, optimizer, batches, recipe):
        print(
            f"step {report.step}: loss {report.metrics['loss']:.3f}, {report.seconds:.3f} s",
            flush=True,
        )
        seconds.append(report.seconds)
    step_seconds = statistics.median(seconds[WARM_STEPS:])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = peak_flops(name, train.precision)
    tokens = train.global_batch * length
    return Speed(
        device=name,
        torch=torch.__version__,
        parameters=parameters,
        micro_batch=rows,
        global_batch=train.global_batch,
        step_seconds=step_seconds,
        tokens_per_second=tokens / step_seconds,
        token_flops=token_flops,
        mfu=mfu(token_flops * tokens, step_seconds, 1, peak) if peak else None,
        peak_bytes=torch.cuda.max_memory_reserved() if device.type == "cuda" else 0,
    )


def describe(speed: Speed) -> dict[str, object]:
    """One line of JSON: the benchmark's name and its figures."""
    return {"benchmark": "gpu", **asdict(speed)}


def _make_batches(blocks: Blocks, rows: int, device: torch.device) -> Iterator[loop.Batch]:
    """Random tokens, never the end of a document: each block is one. The same few come again."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(1, blocks.vocab, (BLOCKS, blocks.length), generator=generator).to(device)
    for step in itertools.count():
        tokens = made[torch.arange(step * rows, (step + 1) * rows, device=device) % BLOCKS]
        # A row weighs as many terms as its loss has: one for each token but the last.
        yield loop.Batch((tokens,), tokens, 0, rows, weight=rows * (blocks.length - 1))
