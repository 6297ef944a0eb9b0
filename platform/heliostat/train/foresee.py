"""From a spec and the shape of its rows to what a plan is made of."""

from functools import cache

from heliostat.data.expected import Rows
from heliostat.errors import HeliostatError
from heliostat.models.cost import measure_cost
from heliostat.plan import Model
from heliostat.plan.bill import Volume
from heliostat.plan.memory import WIDTHS, Footprint
from heliostat.plan.serving import Served
from heliostat.signature import Blocks
from heliostat.spec import GptSpec, RunSpec, TrainSpec
from heliostat.train.footprint import measure_footprint


def foresee(spec: RunSpec, rows: Rows) -> Model:
    """The model as a planner sees it.

    Raises:
        HeliostatError: the family does not suit the data, or a user's own network looks at values.
    """
    cost = measure_cost(spec.model, rows.signature)

    @cache
    def footprint(recompute: bool) -> Footprint:
        train = spec.train.model_copy(update={"recompute": recompute})
        return measure_footprint(spec.model, rows.signature, train)

    of = rows.signature.input
    length = of.length if isinstance(of, Blocks) else 1
    return Model(spec.name, cost.parameters, cost.train_flops_per_sample, length, footprint)


def foresee_volume(spec: RunSpec, rows: Rows, model: Model, tokens: int | None) -> Volume:
    """What a run reads and keeps: `tokens` in all, or its epochs of the rows that there are.

    A checkpoint holds weights, optimiser and their moving average.

    Raises:
        HeliostatError: nothing says how long the run is.
    """
    train, footprint = spec.train, model.footprint(spec.train.recompute)
    steps, stored = _count_steps(train, rows.count, model.tokens_per_row, tokens)
    return Volume(
        steps,
        stored,
        rows.row_bytes,
        footprint.weights + footprint.optimizer + footprint.average,
        train.keep_checkpoints,
    )


def foresee_served(spec: RunSpec, rows: Rows) -> Served:
    """The model as replicas hold it: in float32, or as vLLM holds it on GPUs.

    Raises:
        HeliostatError: the family does not suit the data, or a user's own network looks at values.
    """
    cost, of = measure_cost(spec.model, rows.signature), rows.signature.input
    width = WIDTHS[find_served_precision(spec)]
    weights = cost.parameters * width
    if not isinstance(spec.model, GptSpec) or not isinstance(of, Blocks):
        return Served(cost.flops_per_sample, weights)
    model = spec.model
    heads = model.kv_heads or model.heads
    numbers = 2 * model.layers * heads * (model.width // model.heads)
    return Served(cost.flops_per_sample / of.length, weights, numbers * width)


def find_served_precision(spec: RunSpec) -> str:
    if spec.model.kind != "gpt" or spec.deploy.engine != "vllm":
        return "fp32"
    return {"float32": "fp32", "float16": "fp16"}.get(spec.deploy.vllm.dtype, "bf16")


def _count_steps(
    train: TrainSpec, rows: int | None, tokens_per_row: int, tokens: int | None
) -> tuple[int, int]:
    """The steps of the run, and the rows that it needs; `tokens` put aside what the spec says."""
    step_tokens = tokens_per_row * train.global_batch
    ends = [train.steps, train.stop.tokens and -(-train.stop.tokens // step_tokens)]
    if rows:
        ends.append(train.epochs * -(-rows // train.global_batch))
    if tokens:
        ends = [-(-tokens // step_tokens)]
    known = [steps for steps in ends if steps]
    if not known:
        raise HeliostatError(
            "how long the run is depends on the data: give --rows or --tokens, or set train.steps"
        )
    return min(known), rows or min(known) * train.global_batch
