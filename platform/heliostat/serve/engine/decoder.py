"""A Gpt laid out for generation: fused weights, a cache of keys and values, few operations a step.

Shapes: N streams, E = (H + 2K) C of H query heads and K key and value heads of width C, D width,
F feed-forward width, L context, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from heliostat.models.gpt import Gpt
from heliostat.models.gpt import Layer as GptLayer
from heliostat.serve.engine import steps
from heliostat.serve.engine.steps import Layer, Model

LENGTH_STEP = 32  # attention reads a multiple of so many tokens
# A matrix that lies in the cache of one core is multiplied there, unless it is by many rows: a
# second thread has to be waited for, and while it has no part of the work it keeps a core busy.
CACHED_WEIGHTS = 2**20
FEW_PRODUCTS = 2**27


class Decoder:
    """Logits of the next token for streams in the slots of a cache.

    A slot keeps `context` tokens. What is in a slot is whatever `prefill`, `decode` and `move`
    have put there; who holds which is not known here.
    """

    def __init__(self, network: Gpt, slots: int, context: int) -> None:
        self.context = context
        with torch.inference_mode():
            self.model = lay_out(network, context)
            # NumPy's zeros take memory only once they are written.
            width = 2 * self.model.kv_heads * self.model.width
            self.caches = [
                torch.from_numpy(np.zeros((slots * context, width), np.float32))
                for _ in self.model.layers
            ]

    @property
    def size(self) -> int:
        """Bytes of the weights and of the whole cache."""
        model = self.model
        parts = [model.embed, model.norm, model.head, model.rope, *self.caches]
        parts += [matrix for layer in model.layers for matrix in layer]
        return sum(tensor.nbytes for tensor in parts)

    @torch.inference_mode()
    def prefill(self, first_slot: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read whole prompts into the slots from `first_slot` on; logits (N, V) after each."""
        tokens = torch.tensor([token for prompt in prompts for token in prompt])
        lengths = [len(prompt) for prompt in prompts]
        logits: Tensor = steps.prefill(self.model, self.caches, tokens, lengths, first_slot)
        return logits

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], places: Sequence[int]) -> Tensor:
        """A token for each of the slots 0 to N - 1, at its place; logits (N, V) after it."""
        length = min(self.context, -(-(max(places) + 1) // LENGTH_STEP) * LENGTH_STEP)
        tokens_N, places_N = torch.tensor(tokens), torch.tensor(places)
        logits: Tensor = steps.decode(self.model, self.caches, tokens_N, places_N, length)
        return logits

    @torch.inference_mode()
    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` of one slot to another."""
        start, goal = source * self.context, target * self.context
        for cache in self.caches:
            cache[goal : goal + tokens] = cache[start : start + tokens]

    @contextmanager
    def threads(self, rows: int) -> Iterator[None]:
        """Within, a step of `rows` tokens is made by one thread, if it is a small one."""
        threads = torch.get_num_threads()
        weights = self.model.layers[0].gate_up.numel()
        alone = weights <= CACHED_WEIGHTS and rows * weights <= FEW_PRODUCTS
        torch.set_num_threads(1 if alone else threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def lay_out(network: Gpt, context: int) -> Model:
    first = network.get_submodule("layers.0")
    assert isinstance(first, GptLayer)
    embed_VD = network.embed.weight.float()
    width = embed_VD.shape[1] // first.attention.heads
    cos_LC, sin_LC = network.rope(context, embed_VD.device)
    half, eps = width // 2, network.norm.eps
    assert eps is not None
    return Model(
        embed=embed_VD,
        layers=[lay_out_layer(layer, width) for layer in network.layers],
        norm=network.norm.weight.float(),
        head=_turn(embed_VD if network.head is None else network.head.weight),
        rope=torch.complex(cos_LC[:, :half], sin_LC[:, :half]).unsqueeze(1),
        eps=eps,
        heads=first.attention.heads,
        kv_heads=first.attention.kv_heads,
        width=width,
        context=context,
    )


def lay_out_layer(layer: nn.Module, width: int) -> Layer:
    """Folded and transposed; the rows of queries and keys so that turned pairs are neighbours.

    A product of a query and a key does not change when both are permuted alike.
    """
    assert isinstance(layer, GptLayer)
    attention = layer.attention
    qkv_ED = attention.qkv.weight.float() * layer.attention_norm.weight.float()
    rotated = (attention.heads + attention.kv_heads) * width
    halves = qkv_ED[:rotated].view(-1, 2, width // 2, qkv_ED.shape[1])
    pairs = halves.transpose(1, 2).reshape(rotated, -1)
    gate_up_FD = layer.ffn.gate_up.weight.float() * layer.ffn_norm.weight.float()
    return Layer(
        _turn(torch.cat([pairs, qkv_ED[rotated:]])),
        _turn(attention.out.weight),
        _turn(gate_up_FD),
        _turn(layer.ffn.down.weight),
    )


def _turn(weight: Tensor) -> Tensor:
    """Transposed in memory, too: products of a few rows are twice as fast."""
    return weight.float().T.contiguous()
