"""Laws over the whole table of model families."""

import copy
import sys
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad
from torch.utils.flop_counter import FlopCounterMode

import users_network
from heliostat.errors import HeliostatError
from heliostat.models import MODELS, PREPARED, SUITED, build, count_parameters, task_of
from heliostat.models.cost import measure_cost
from heliostat.models.recsys import sum_pairs
from heliostat.signature import (
    Blocks,
    Classes,
    Input,
    Interaction,
    NextToken,
    Numbers,
    Picture,
    Series,
    Signature,
    Text,
    Vector,
)
from heliostat.spec import (
    CnnSpec,
    CustomSpec,
    EncoderSpec,
    GptSpec,
    MlpSpec,
    ModelSpec,
    OptimizerSpec,
    RecsysSpec,
    RnnSpec,
    Section,
)
from heliostat.train import loop
from heliostat.train.optim import build_optimizer

FOUR = Classes(("ash", "elm", "fir", "oak"))
TWO = Classes(("no", "yes"))
TEN = Classes(tuple("0123456789"))
RATING = Numbers(("rating",), (3.5,), (1.1,))
SPEED = Numbers(("mean", "peak"), (3.5, 9.0), (1.1, 2.0))
TABLE, IMAGE, SERIES = Vector(7), Picture(3, 8, 8), Series(6, 5)
TEXT, RATED = Text(6, 40), Interaction((20, 30), 3)
BLOCKS = Blocks(12, 20, 0)
LENET = CnnSpec(kind="cnn", channels=(6, 16), kernel=5, padding="valid", hidden=(120, 84))
CUSTOM = CustomSpec(kind="custom", build="users_network:build", options={"hidden": 16})

CASES: dict[str, tuple[ModelSpec, Signature]] = {
    "mlp": (MlpSpec(kind="mlp", hidden=(32,)), Signature(IMAGE, FOUR)),
    "mlp-linear": (MlpSpec(kind="mlp", hidden=()), Signature(Vector(20), FOUR)),
    "mlp-bce": (MlpSpec(kind="mlp", hidden=(32,), loss="bce"), Signature(TABLE, TWO)),
    "mlp-regression": (MlpSpec(kind="mlp", hidden=(32, 16)), Signature(TABLE, SPEED)),
    "cnn": (CnnSpec(kind="cnn", channels=(8,), hidden=(32,)), Signature(IMAGE, FOUR)),
    "cnn-residual": (
        CnnSpec(kind="cnn", block="residual", channels=(8, 8, 12), hidden=(16,)),
        Signature(IMAGE, FOUR),
    ),
    "cnn-lenet": (LENET, Signature(Picture(3, 32, 32), TEN)),
    "cnn-regression": (CnnSpec(kind="cnn", channels=(8,)), Signature(Picture(1, 9, 7), SPEED)),
    "gru": (RnnSpec(kind="rnn", width=16), Signature(SERIES, FOUR)),
    "gru-deep": (
        RnnSpec(kind="rnn", width=12, layers=2, bidirectional=True),
        Signature(SERIES, SPEED),
    ),
    "gru-text": (RnnSpec(kind="rnn", width=16, bidirectional=True), Signature(TEXT, FOUR)),
    "lstm": (RnnSpec(kind="rnn", cell="lstm", width=16, layers=2), Signature(SERIES, FOUR)),
    "lstm-text-bce": (
        RnnSpec(kind="rnn", cell="lstm", width=16, bidirectional=True, loss="bce"),
        Signature(TEXT, TWO),
    ),
    "recsys-dot": (RecsysSpec(kind="recsys", embedding=8), Signature(RATED, RATING)),
    "recsys-mlp": (RecsysSpec(kind="recsys", interaction="mlp"), Signature(RATED, RATING)),
    "recsys-ids": (
        RecsysSpec(kind="recsys", embedding=4, hidden=()),
        Signature(Interaction((20, 30, 9), 0), FOUR),
    ),
    "encoder": (
        EncoderSpec(kind="encoder", layers=2, width=16, max_positions=8),
        Signature(TEXT, FOUR),
    ),
    "encoder-first-bce": (
        EncoderSpec(kind="encoder", layers=1, width=16, pool="first", loss="bce"),
        Signature(TEXT, TWO),
    ),
    "gpt": (
        GptSpec(kind="gpt", layers=2, width=24, heads=6, kv_heads=2),
        Signature(BLOCKS, NextToken()),
    ),
    "gpt-untied": (
        GptSpec(kind="gpt", layers=1, width=16, tied=False),
        Signature(BLOCKS, NextToken()),
    ),
    "custom": (CUSTOM, Signature(IMAGE, FOUR)),
    "custom-loss": (
        CUSTOM.model_copy(update={"loss": "users_network:focal_loss"}),
        Signature(IMAGE, FOUR),
    ),
}

# Of these the network has a layer that drops.
NOISY = [case for case, (spec, _) in CASES.items() if getattr(spec, "hidden", True)]

over_all_cases = pytest.mark.parametrize("case", CASES)
over_sequences = pytest.mark.parametrize("case", ["gru", "gru-deep", "gru-text", "lstm"])


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """The same numbers every time, on one thread: networks as small as these only wait for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def draw_inputs(of: Input, rows: int) -> tuple[Tensor, ...]:
    """Random inputs; sequences as long as may be, at least one of them."""
    match of:
        case Vector(width):
            return (torch.randn(rows, width),)
        case Picture(channels, height, width):
            return (torch.randn(rows, channels, height, width),)
        case Series(length, channels):
            lengths = 1 + torch.arange(rows).flip(0) % length
            valid = torch.arange(length) < lengths[:, None]
            return torch.randn(rows, length, channels) * valid[:, :, None], lengths
        case Text(length, vocab):
            lengths = 1 + torch.arange(rows).flip(0) % length
            valid = torch.arange(length) < lengths[:, None]
            return torch.randint(1, vocab, (rows, length)) * valid, lengths
        case Blocks(length, vocab):
            return (torch.randint(vocab, (rows, length)),)
        case Interaction(ids, width):
            columns = [torch.randint(1, size, (rows,)) for size in ids]
            return torch.stack(columns, dim=1), torch.randn(rows, width)


def draw_targets(signature: Signature, inputs: tuple[Tensor, ...]) -> Tensor:
    rows = len(inputs[0])
    match signature.output:
        case Classes(labels):
            return torch.arange(rows) % len(labels)
        case Numbers(names):
            return torch.randn(rows, len(names))
        case NextToken():
            return inputs[0]


def draw_batch(signature: Signature, rows: int) -> loop.Batch:
    inputs = draw_inputs(signature.input, rows)
    return loop.Batch(inputs, draw_targets(signature, inputs), 0, rows, rows)


def select(inputs: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor[rows] for tensor in inputs)


def with_dropout(spec: ModelSpec, share: float) -> ModelSpec:
    if isinstance(spec, CustomSpec):
        return spec.model_copy(update={"options": {**spec.options, "dropout": share}})
    return spec.model_copy(update={"dropout": share})


def fit(
    spec: ModelSpec, signature: Signature, batches: list[loop.Batch], **recipe: Any
) -> Iterator[loop.StepReport]:
    torch.manual_seed(0)
    model = build(spec, signature)
    optimizer = build_optimizer(OptimizerSpec(kind="adam", lr=0.01), model)
    how = loop.Recipe(rate=lambda step: 0.01, **recipe)
    return loop.fit(model, task_of(spec, signature), optimizer, batches, how)


def test_every_family_is_under_the_laws() -> None:
    assert {spec.kind for spec, _ in CASES.values()} == MODELS.keys()


@over_all_cases
def test_overfits_eight_samples(case: str) -> None:
    spec, signature = CASES[case]
    reports = fit(spec, signature, [draw_batch(signature, 8)] * 150)
    first = next(reports).metrics["loss"]
    assert first > 0.3
    assert any(report.metrics["loss"] < 0.05 * first for report in reports)


@over_all_cases
def test_weights_survive_a_round_trip_bit_for_bit(case: str) -> None:
    spec, signature = CASES[case]
    model, other = (build(spec, signature) for _ in range(2))
    inputs = draw_inputs(signature.input, 5)
    assert not torch.equal(model(*inputs), other(*inputs))
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(model.state_dict())))
    assert torch.equal(model(*inputs), other(*inputs))


@over_all_cases
def test_a_batch_without_rows_gives_every_weight_a_gradient_of_zero(case: str) -> None:
    """What a rank without rows owes the others, who wait for its gradients."""
    spec, signature = CASES[case]
    model, task = build(spec, signature), task_of(spec, signature)
    inputs = select(draw_inputs(signature.input, 1), torch.arange(0))
    outputs = model(*inputs)
    assert (len(outputs), outputs.shape[-1]) == (0, task.width)
    torch.autograd.backward(task.loss(outputs, draw_targets(signature, inputs)))
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.any()] == []


@over_all_cases
def test_a_row_does_not_feel_the_others_of_its_batch(case: str) -> None:
    spec, signature = CASES[case]
    model = build(spec, signature).train()
    inputs = draw_inputs(signature.input, 6)
    together = model(*inputs)
    assert not torch.allclose(together[0], together[1])
    shuffled = torch.randperm(6)
    torch.testing.assert_close(model(*select(inputs, shuffled)), together[shuffled])
    for row in range(6):
        alone = model(*select(inputs, torch.tensor([row])))
        torch.testing.assert_close(alone, together[row : row + 1])


@pytest.mark.parametrize("case", NOISY)
def test_the_noise_of_dropout_does_not_depend_on_the_micro_batch(case: str) -> None:
    spec, signature = CASES[case]
    batch, noisy = draw_batch(signature, 8), with_dropout(spec, 0.4)
    (plain,) = fit(spec, signature, [batch])
    (whole,), *parts = (
        fit(noisy, signature, [batch], seed=7, micro_batch=size) for size in (None, 3, 1)
    )
    assert abs(whole.metrics["loss"] - plain.metrics["loss"]) > 1e-4
    for (part,) in parts:
        assert part.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-5)
        assert part.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@over_all_cases
def test_the_cost_is_what_is_counted_when_real_rows_are_run(case: str) -> None:
    spec, signature = CASES[case]
    cost, model, rows = measure_cost(spec, signature), build(spec, signature), 5
    assert cost.parameters == count_parameters(model) > 0
    assert cost.activation_bytes_per_sample > 0
    batch = draw_batch(signature, rows)
    inputs = batch.inputs
    if isinstance(signature.input, Series | Text):
        inputs = (inputs[0], torch.full((rows,), signature.input.length))
    # oneDNN's LSTM and fused attention are operations that the counter does not know on a CPU.
    with (
        torch.backends.mkldnn.flags(enabled=False),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        outputs = model(*inputs)
        assert counter.get_total_flops() == rows * cost.flops_per_sample > 0
        torch.autograd.backward(task_of(spec, signature).loss(outputs, batch.targets))
    assert counter.get_total_flops() == rows * cost.train_flops_per_sample
    assert cost.train_flops_per_sample > 1.5 * cost.flops_per_sample


def test_the_cost_of_an_mlp_is_the_formula() -> None:
    widths = (784, 128, 64, 10)
    products = [inputs * outputs for inputs, outputs in pairwise(widths)]
    cost = measure_cost(MlpSpec(kind="mlp", hidden=widths[1:-1]), Signature(Vector(784), TEN))
    assert cost.parameters == sum(products) + sum(widths[1:])
    assert cost.flops_per_sample == 2 * sum(products)
    # A gradient of every weight and, but for the first layer, of every input.
    assert cost.train_flops_per_sample == 6 * sum(products) - 2 * products[0]
    # The input of every layer, the log-probabilities and the label.
    assert cost.activation_bytes_per_sample == 4 * sum(widths[:-1]) + 4 * 10 + 8


def test_the_cost_of_a_cnn_is_the_formula() -> None:
    """LeNet on colour: 28x28 and 10x10 places of the two convolutions, 400 inputs to the layers."""
    cost = measure_cost(*CASES["cnn-lenet"])
    products = [28**2 * 6 * 3 * 5**2, 10**2 * 16 * 6 * 5**2, 400 * 120, 120 * 84, 84 * 10]
    assert cost.parameters == 62_006
    assert cost.flops_per_sample == 2 * sum(products)
    assert cost.train_flops_per_sample == 6 * sum(products) - 2 * products[0]


def test_the_cost_of_a_gpt_is_the_formula() -> None:
    """Two heads share a key and a value; scores and their sums are over all T x T pairs."""
    spec = GptSpec(kind="gpt", layers=3, width=32, heads=4, kv_heads=2, ffn=48)
    cost = measure_cost(spec, Signature(Blocks(10, 50, 0), NextToken()))
    layer = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48
    assert cost.parameters == 3 * (layer + 2 * 32) + 32 + 50 * 32
    assert cost.flops_per_sample == 2 * 10 * (3 * (layer + 2 * 10 * 32) + 50 * 32)
    assert cost.train_flops_per_sample == 3 * cost.flops_per_sample


@pytest.mark.parametrize(("cell", "gates"), [("gru", 3), ("lstm", 4)])
def test_the_cost_of_a_long_series_is_the_formula(cell: Any, gates: int) -> None:
    spec = RnnSpec(kind="rnn", cell=cell, width=8)
    cost, less = (measure_cost(spec, Signature(Series(steps, 3), FOUR)) for steps in (5000, 4000))
    assert cost.flops_per_sample == 5000 * 2 * gates * 8 * (3 + 8) + 2 * 8 * 4
    # Of a step the inputs are kept and seven tensors of the cell's width, in either cell.
    kept = cost.activation_bytes_per_sample - less.activation_bytes_per_sample
    assert kept == 1000 * 4 * (3 + 7 * 8)


@pytest.mark.parametrize(
    ("of", "suited"),
    [
        (TABLE, "mlp"),
        (IMAGE, "cnn or mlp"),
        (SERIES, "rnn"),
        (TEXT, "encoder or rnn"),
        (Blocks(6, 40, 0), "gpt"),
        (RATED, "recsys"),
    ],
)
def test_a_family_that_does_not_suit_the_data_is_refused(of: Input, suited: str) -> None:
    signature = Signature(of, NextToken() if isinstance(of, Blocks) else FOUR)
    for spec in {spec.kind: spec for spec, _ in CASES.values()}.values():
        if spec.kind in ("custom", *suited.split(" or ")):
            continue
        with pytest.raises(HeliostatError) as refused:
            build(spec, signature)
        told = f"model.kind={spec.kind} cannot take {of.describe()}: use model.kind={suited}"
        other_way = PREPARED.get((type(of), spec.kind))
        assert str(refused.value) == (
            f"{told}, or prepare the data with {other_way}" if other_way else told
        )


@pytest.mark.parametrize(("of", "kind"), PREPARED)
def test_what_is_advised_for_a_family_is_for_another_input_than_it_takes(
    of: type[Input], kind: str
) -> None:
    assert kind in MODELS
    assert kind not in SUITED[of]


def test_an_image_too_small_for_the_stages_is_refused() -> None:
    deep = CnnSpec(kind="cnn", channels=(4, 4, 4, 4))
    with pytest.raises(HeliostatError, match="at most 3 stages"):
        build(deep, Signature(Picture(1, 8, 8), FOUR))


def test_a_binary_loss_needs_two_classes() -> None:
    spec = MlpSpec(kind="mlp", loss="bce")
    with pytest.raises(HeliostatError, match="bce needs two classes, the data has 4"):
        build(spec, Signature(TABLE, FOUR))
    with pytest.raises(HeliostatError, match="bce needs classes"):
        build(spec, Signature(TABLE, SPEED))


@pytest.mark.parametrize(
    ("kind", "keys", "reason"),
    [
        (MlpSpec, {"kind": "mlp", "dropout": 1.0}, "less than 1"),
        (MlpSpec, {"kind": "mlp", "dropout": 0.1, "hidden": []}, "hidden names none"),
        (CustomSpec, {"kind": "custom", "build": ".net:build"}, "match pattern"),
        (CustomSpec, {"kind": "custom", "build": "net.build"}, "match pattern"),
    ],
)
def test_a_section_that_cannot_work_is_refused(
    kind: type[Section], keys: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValidationError, match=reason):
        kind.model_validate(keys)


@over_sequences
@pytest.mark.parametrize("further", [1, 5])
def test_what_stands_after_a_row_is_not_looked_at(case: str, further: int) -> None:
    spec, signature = CASES[case]
    model = build(spec, signature)
    x, lengths = draw_inputs(signature.input, 6)
    steps = (0, 0, 0, further) if x.ndim == 3 else (0, further)
    assert torch.equal(model(pad(x, steps), lengths), model(x, lengths))
    after = torch.arange(x.shape[1]) >= lengths[:, None]
    x_changed = x.clone()
    x_changed[after] = 17
    assert not torch.equal(x, x_changed)
    assert torch.equal(model(x_changed, lengths), model(x, lengths))


@pytest.mark.parametrize("case", ["gru-deep", "gru-text", "lstm-text-bce"])
def test_the_last_state_is_that_of_each_direction_of_the_row_alone(case: str) -> None:
    spec, signature = CASES[case]
    model: Any = build(spec, signature)
    x, lengths = draw_inputs(signature.input, 6)
    together = model(x, lengths)
    for row, length in enumerate(lengths):
        steps, _ = model.cells(model.embedding(x[row, :length]))
        forward, backward = steps.chunk(2, dim=1)
        torch.testing.assert_close(model.head(torch.cat([forward[-1], backward[0]])), together[row])


def test_a_row_without_steps_is_one_of_a_zero() -> None:
    spec, signature = CASES["gru"]
    model = build(spec, signature)
    empty = model(torch.zeros(2, 0, 5), torch.tensor([0, 0]))
    torch.testing.assert_close(empty, model(torch.zeros(2, 1, 5), torch.tensor([1, 1])))


def test_the_products_are_those_of_all_pairs() -> None:
    e_NKE = torch.randn(4, 5, 3)
    pairs = [(e_NKE[:, a] * e_NKE[:, b]) for a, b in combinations(range(5), 2)]
    torch.testing.assert_close(sum_pairs(e_NKE), torch.stack(pairs).sum(dim=0))


def test_a_rating_is_the_dot_product_the_biases_and_the_mlp() -> None:
    spec, signature = CASES["recsys-dot"]
    model: Any = build(spec, signature)
    for table in model.biases:
        nn.init.normal_(table.weight)
    ids, x = draw_inputs(signature.input, 4)
    user, item = (table(column) for table, column in zip(model.embeddings, ids.T, strict=True))
    bias = sum(table(column) for table, column in zip(model.biases, ids.T, strict=True))
    dot = (user * item).sum(dim=1, keepdim=True)
    mlp = model.layers(torch.cat([user, item, x], dim=1))
    torch.testing.assert_close(model(ids, x), dot + bias + mlp)


@pytest.mark.parametrize("case", ["recsys-dot", "recsys-mlp", "recsys-ids"])
def test_an_id_that_was_not_seen_stays_neutral(case: str) -> None:
    """Its vectors are zero and training does not move them, so only the other columns speak."""
    spec, signature = CASES[case]
    model: Any = build(spec, signature)
    ids, x = draw_inputs(signature.input, 4)
    ids[:, 0] = 0
    model(ids, x).square().sum().backward()
    for tables in (model.embeddings, getattr(model, "biases", [])):
        for column, table in enumerate(tables):
            assert not table.weight[0].any()
            assert not table.weight.grad[0].any()
            assert table.weight.grad.any() == (column > 0)


def test_a_users_network_keeps_its_name_and_its_weights() -> None:
    model = build(*CASES["custom"])
    assert type(model).__name__ == "Net"
    assert list(model.state_dict()) == ["first.weight", "first.bias", "last.weight", "last.bias"]
    copied = copy.deepcopy(model)
    nn.init.zeros_(next(copied.parameters()))
    assert next(model.parameters()).any()


def test_a_users_module_is_found_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text(
        "from torch import nn\n"
        "def make(signature):\n"
        "    import beside\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(192, beside.OUTPUTS))\n"
    )
    (tmp_path / "beside.py").write_text("OUTPUTS = 4\n")
    spec, path = CustomSpec(kind="custom", build="only_here:make"), list(sys.path)
    with pytest.raises(HeliostatError, match=r"the module only_here, which is not in .*evaluate"):
        build(spec, Signature(IMAGE, FOUR))
    monkeypatch.chdir(tmp_path)
    assert build(spec, Signature(IMAGE, FOUR))(torch.zeros(2, 3, 8, 8)).shape == (2, 4)
    assert sys.path == path


def test_a_missing_package_of_a_users_module_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_more.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        build(CustomSpec(kind="custom", build="needs_more:make"), Signature(IMAGE, FOUR))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"build": "no_such:build"}, "needs the module no_such, which is not in"),
        ({"build": "users_network.deeper:build"}, "needs the module users_network.deeper"),
        ({"build": "users_network:bild"}, "the module users_network has no function bild"),
        ({"build": "users_network:not_a_function"}, "has no function not_a_function"),
        ({"build": "users_network:build_nothing", "options": {}}, "returned a dict: it must"),
        ({"options": {"widht": 3}}, "model.options .*'widht'"),
        ({"options": {}}, "missing a required argument: 'hidden'"),
        ({"options": {"hidden": 8, "extra": 1}}, r"\(8, 5\): this data needs .*\(8, 4\)"),
        ({"loss": "users_network:no_loss"}, "model.loss=.* has no function no_loss"),
        ({"loss": "users_network:mean_loss"}, r"returned a tensor of \(\) for 8 rows: .*\(8,\)"),
    ],
)
def test_a_users_mistake_is_told_in_a_sentence(keys: dict[str, Any], sentence: str) -> None:
    signature = Signature(IMAGE, FOUR)
    with pytest.raises(HeliostatError, match=sentence) as refused:
        list(fit(CUSTOM.model_copy(update=keys), signature, [draw_batch(signature, 8)]))
    assert "\n" not in str(refused.value)


def test_a_users_loss_is_the_mean_over_rows_whatever_a_row_predicts() -> None:
    spec = CUSTOM.model_copy(update={"loss": "users_network:row_errors"})
    outputs, targets = torch.randn(8, 2), torch.randn(8, 2)
    task = task_of(spec, Signature(IMAGE, SPEED))
    mean = task.loss(outputs, targets) / (8 * task.units)
    torch.testing.assert_close(mean, users_network.row_errors(outputs, targets).mean())
