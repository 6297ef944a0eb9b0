"""Laws of the decoder: what a token sees, how it is compiled, how it begins."""

import math

import pytest
import torch
from torch import Tensor, nn

from heliostat.models import build, gpt
from heliostat.signature import Blocks, NextToken, Signature
from heliostat.spec import GptSpec, RopeScalingSpec

LENGTH, VOCAB, END = 24, 50, 3
SIGNATURE = Signature(Blocks(LENGTH, VOCAB, END), NextToken())
SPECS = {
    "plain": GptSpec(kind="gpt", layers=2, width=48, heads=4),
    "grouped": GptSpec(kind="gpt", layers=2, width=48, heads=6, kv_heads=2, tied=False),
    "stretched": GptSpec(
        kind="gpt",
        layers=1,
        width=48,
        heads=3,
        kv_heads=1,
        rope_scaling=RopeScalingSpec(factor=8.0, original_positions=16),
    ),
}


def build_loud(spec: GptSpec) -> nn.Module:
    """A network whose weights are so large that a mistake in attention shows in the logits."""
    torch.manual_seed(0)
    network = build(spec, SIGNATURE).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim == 2 else 1.0)
    return network


def sample_tokens(rows: int, ends: tuple[int, ...] = ()) -> Tensor:
    tokens = torch.randint(END + 1, VOCAB, (rows, LENGTH), generator=torch.manual_seed(1))
    tokens[:, list(ends)] = END
    return tokens


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@torch.inference_mode()
def test_a_packed_document_is_read_as_if_it_stood_alone(spec: GptSpec) -> None:
    network = build_loud(spec)
    tokens = sample_tokens(2, ends=(0, 6, 7, 19))
    packed = network(tokens)
    for start, stop in ((0, 1), (1, 7), (7, 8), (8, 20), (20, 24)):
        alone = network(tokens[:, start:stop])
        torch.testing.assert_close(packed[:, start:stop], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ends", [(), (5, 11)])
@torch.inference_mode()
def test_no_token_sees_what_follows(ends: tuple[int, ...]) -> None:
    network = build_loud(SPECS["grouped"])
    tokens = sample_tokens(2, ends)
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] + 1) % VOCAB
    before, after = network(tokens), network(changed)
    torch.testing.assert_close(before[:, :15], after[:, :15])
    assert not torch.allclose(before[:, 15:], after[:, 15:])


@pytest.mark.parametrize("ends", [(), (LENGTH - 1,)])
def test_without_an_inner_end_there_is_no_mask(ends: tuple[int, ...]) -> None:
    assert gpt.see(sample_tokens(3, ends), END) is None


@torch.inference_mode()
def test_plain_causal_attention_is_that_of_the_mask_of_one_document() -> None:
    q, k, v = torch.randn(2, 6, 9, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(gpt.attend(q, k, v, None), gpt.attend(q, k, v, mask))


@torch.inference_mode()
def test_attention_by_blocks_is_that_of_the_mask_and_one_graph() -> None:
    """The way of a GPU; without one it runs unfused, and forward only."""
    tokens = sample_tokens(3, ends=(4, 5, 17))
    tokens[1, 17] = 7
    documents = [[int((row[:place] == END).sum()) for place in range(LENGTH)] for row in tokens]
    q, k, v = (torch.randn(3, heads, LENGTH, 16) for heads in (6, 3, 3))

    def attend_by_blocks(document_NT: Tensor) -> Tensor:
        return gpt.attend(q, k, v, gpt.see_in_blocks(document_NT))

    compiled = torch.compile(attend_by_blocks, backend="eager", fullgraph=True)
    mask = gpt.see(tokens, END)
    assert isinstance(mask, Tensor)
    torch.testing.assert_close(compiled(torch.tensor(documents)), gpt.attend(q, k, v, mask))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_forward_pass_is_one_graph(spec: GptSpec) -> None:
    network = build_loud(spec)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    for ends in ((), (4, 9)):
        tokens = sample_tokens(2, ends)
        torch.testing.assert_close(compiled(tokens), network(tokens), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_row_does_not_depend_on_its_batch_which_may_be_empty() -> None:
    network = build_loud(SPECS["grouped"])
    tokens = sample_tokens(3)
    tokens[1, 6] = END
    apart = torch.cat([network(tokens[row : row + 1]) for row in range(3)])
    torch.testing.assert_close(network(tokens), apart, atol=1e-4, rtol=1e-4)
    assert network(tokens[:0]).shape == (0, LENGTH, VOCAB)


def test_under_autocast_the_residual_stream_is_in_half_precision() -> None:
    network = build(SPECS["grouped"], SIGNATURE)
    widths = set[torch.dtype]()
    assert isinstance(network.layers, nn.ModuleList)
    for layer in network.layers:
        layer.register_forward_hook(lambda _layer, _inputs, output: widths.add(output.dtype))
    tokens = sample_tokens(2)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(tokens)
    assert widths == {logits.dtype} == {torch.bfloat16}
    torch.testing.assert_close(logits.float(), network(tokens), atol=0.05, rtol=0.05)


def test_it_begins_near_the_uniform_distribution_with_small_residuals() -> None:
    torch.manual_seed(0)
    spec = GptSpec(kind="gpt", layers=8, width=128, heads=4)
    network = build(spec, SIGNATURE)
    layer = network.get_submodule("layers.7")
    for name, std in {
        "attention.qkv": 0.02,
        "ffn.gate_up": 0.02,
        "attention.out": 0.02 / math.sqrt(16),
        "ffn.down": 0.02 / math.sqrt(16),
    }.items():
        weight = layer.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    tokens = sample_tokens(8)
    loss = nn.functional.cross_entropy(
        network(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    assert loss.item() == pytest.approx(math.log(VOCAB), rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("ends", [(), (4, 9)])
def test_a_gpu_gives_the_same_logits_and_gradients(compiled: bool, ends: tuple[int, ...]) -> None:
    spec = GptSpec(kind="gpt", layers=2, width=128, heads=4, kv_heads=2)
    tokens = sample_tokens(3, ends)
    network = build_loud(spec)
    network(tokens).square().mean().backward()
    other = build_loud(spec).cuda()
    run = torch.compile(other, fullgraph=True) if compiled else other
    run(tokens.cuda()).square().mean().backward()
    for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(theirs.grad.cpu(), mine.grad, atol=1e-3, rtol=1e-2)
    assert run(tokens[:0].cuda()).shape == (0, LENGTH, VOCAB)
