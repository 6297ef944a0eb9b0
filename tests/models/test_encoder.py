"""Laws of the encoder: padding is not looked at, whatever it holds."""

import pytest
import torch
from torch import Tensor, nn

from heliostat.errors import HeliostatError
from heliostat.models import build, encoder
from heliostat.signature import Classes, Signature, Text
from heliostat.spec import EncoderSpec

LENGTH, VOCAB, CLASSES = 12, 50, Classes(("ham", "spam", "other"))
SIGNATURE = Signature(Text(LENGTH, VOCAB), CLASSES)
LENGTHS = torch.tensor([12, 1, 7, 0])
POOLS = ("mean", "first")


def build_loud(pool: str) -> nn.Module:
    """A network whose weights are so large that a look at the padding shows in the logits."""
    torch.manual_seed(0)
    spec = EncoderSpec.model_validate(
        {"kind": "encoder", "layers": 2, "width": 48, "heads": 4, "pool": pool}
    )
    network = build(spec, SIGNATURE).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim == 2 else 1.0)
    return network


def sample_ids() -> Tensor:
    return torch.randint(0, VOCAB, (len(LENGTHS), LENGTH), generator=torch.manual_seed(1))


@pytest.mark.parametrize("pool", POOLS)
@torch.inference_mode()
def test_a_text_gives_the_same_however_it_is_padded(pool: str) -> None:
    network, ids = build_loud(pool), sample_ids()
    padded = network(ids, LENGTHS)
    for row, length in enumerate(LENGTHS[:3].tolist()):
        alone = network(ids[row : row + 1, :length], LENGTHS[row : row + 1])
        torch.testing.assert_close(padded[row : row + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pool", POOLS)
@torch.inference_mode()
def test_order_and_every_valid_token_matter(pool: str) -> None:
    network, ids = build_loud(pool), sample_ids()
    swapped = ids.clone()
    swapped[0, [3, 4]] = ids[0, [4, 3]]
    assert not torch.allclose(network(swapped, LENGTHS)[0], network(ids, LENGTHS)[0])


@pytest.mark.parametrize("pool", POOLS)
def test_texts_without_tokens_and_batches_without_texts_are_taken(pool: str) -> None:
    network, ids = build_loud(pool), sample_ids()
    logits = network(ids, LENGTHS)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert network(ids[:0], LENGTHS[:0]).shape == (0, 3)
    assert network(ids[:0, :0], LENGTHS[:0]).shape == (0, 3)


@torch.inference_mode()
def test_the_forward_pass_is_one_graph() -> None:
    network, ids = build_loud("mean"), sample_ids()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, LENGTHS), network(ids, LENGTHS))


def test_texts_longer_than_the_positions_are_refused() -> None:
    spec = EncoderSpec(kind="encoder", max_positions=8)
    with pytest.raises(HeliostatError, match=r"up to 12 tokens.*max_positions is 8.*text\.block"):
        encoder.build_encoder(spec, SIGNATURE, 3)
