"""A Gpt laid out for generation: fused weights, a cache of keys and values, few operations a step.

Shapes: N streams, S tokens of all prompts one after another, T tokens of a stream, D width, H query
heads, K key and value heads, C width of a head, E = (H + 2K) C, F feed-forward width, L context,
V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from heliostat.models.gpt import Gpt, Layer, attend

Attend = Callable[[Tensor, Tensor], Tensor]

LENGTH_STEP = 32  # attention reads a multiple of so many tokens
# Multiplications of a product that one core does before a second one has joined it, and waited for
# the processes that answer the clients.
FEW_PRODUCTS = 2**22


@dataclass(frozen=True)
class Weights:
    """The matrices of a layer, transposed: (D, E), (D, D), (D, 2F) and (F, D).

    Those that follow a norm have its weights inside.
    """

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor


class Decoder:
    """Logits of the next token for streams in the slots of a cache.

    A slot keeps `context` tokens. What is in a slot is whatever `prefill`, `decode` and `move`
    have put there; who holds which is not known here.
    """

    def __init__(self, network: Gpt, slots: int, context: int) -> None:
        first = network.get_submodule("layers.0")
        assert isinstance(first, Layer)
        self.heads, self.kv_heads = first.attention.heads, first.attention.kv_heads
        self.context = context
        with torch.inference_mode():
            self.head = network.embed.weight.shape[1] // self.heads
            self.embed_VD = network.embed.weight.float()
            head = network.head
            self.head_DV = _turn(self.embed_VD if head is None else head.weight)
            self.norm = network.norm.weight.float()
            self.eps = network.norm.eps
            self.layers = [self._lay_out(layer) for layer in network.layers]
            cos_LC, sin_LC = network.rope(context, self.embed_VD.device)
            half = self.head // 2
            self.rope_L1C = torch.complex(cos_LC[:, :half], sin_LC[:, :half]).unsqueeze(1)
            # NumPy's zeros take memory only once they are written.
            width = 2 * self.kv_heads * self.head
            self.caches = [
                torch.from_numpy(np.zeros((slots * context, width), np.float32))
                for _ in self.layers
            ]

    @property
    def size(self) -> int:
        """Bytes of the weights and of the whole cache."""
        parts = [self.embed_VD, self.norm, self.rope_L1C, *self.caches]
        parts += [tensor for layer in self.layers for tensor in vars(layer).values()]
        if self.head_DV.data_ptr() != self.embed_VD.data_ptr():
            parts.append(self.head_DV)
        return sum(tensor.nbytes for tensor in parts)

    @torch.inference_mode()
    def prefill(self, first_slot: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read whole prompts into the slots from `first_slot` on; logits (N, V) after each."""
        lengths = [len(prompt) for prompt in prompts]
        tokens_S = torch.tensor([token for prompt in prompts for token in prompt])
        places_S = torch.cat([torch.arange(length) for length in lengths])
        slots_S = torch.repeat_interleave(torch.tensor(lengths)) + first_slot
        spans = torch.tensor([0, *lengths]).cumsum(0).tolist()

        def attend_within(qkv_SE: Tensor, _cache: Tensor) -> Tensor:
            seen = [self._attend_prompt(qkv_SE[start:stop]) for start, stop in pairwise(spans)]
            return torch.cat(seen)

        with self._threads(len(tokens_S)):
            x_SD = self._run(tokens_S, places_S, slots_S, attend_within)
            return self._read_out(x_SD[torch.tensor(spans[1:]) - 1])

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], places: Sequence[int]) -> Tensor:
        """A token for each of the slots 0 to N - 1, at its place; logits (N, V) after it."""
        count = len(tokens)
        places_N = torch.tensor(places)
        length = min(self.context, -(-(max(places) + 1) // LENGTH_STEP) * LENGTH_STEP)
        unseen_N11T = (torch.arange(length) > places_N[:, None])[:, None, None]
        mask_N11T = torch.zeros(count, 1, 1, length).masked_fill_(unseen_N11T, -torch.inf)

        def attend_cache(qkv_NE: Tensor, cache: Tensor) -> Tensor:
            kv_NT2KC = cache.view(-1, self.context, 2, self.kv_heads, self.head)[:count, :length]
            k_NKTC, v_NKTC = kv_NT2KC.permute(2, 0, 3, 1, 4)
            # The query heads that share a key stand where the tokens of a query would.
            q_NKGC = qkv_NE[:, : self.heads * self.head].view(count, self.kv_heads, -1, self.head)
            seen_NKGC = functional.scaled_dot_product_attention(
                q_NKGC, k_NKTC, v_NKTC, attn_mask=mask_N11T
            )
            return seen_NKGC.reshape(count, -1)

        with self._threads(count):
            x_ND = self._run(torch.tensor(tokens), places_N, torch.arange(count), attend_cache)
            return self._read_out(x_ND)

    @torch.inference_mode()
    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` of one slot to another."""
        start, goal = source * self.context, target * self.context
        for cache in self.caches:
            cache[goal : goal + tokens] = cache[start : start + tokens]

    @contextmanager
    def _threads(self, rows: int) -> Iterator[None]:
        """Within, small products are made by one thread."""
        threads = torch.get_num_threads()
        few = rows * self.layers[0].gate_up.numel() <= FEW_PRODUCTS
        torch.set_num_threads(1 if few else threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def _run(self, tokens: Tensor, places: Tensor, slots: Tensor, attend: Attend) -> Tensor:
        """The layers over tokens (S,) at their places in their slots; (S, D)."""
        rows_S = slots * self.context + places
        rope_S1C = self.rope_L1C[places]
        rotated, queries = (self.heads + self.kv_heads) * self.head, self.heads * self.head
        x_SD = self.embed_VD[tokens]
        for layer, cache in zip(self.layers, self.caches, strict=True):
            qkv_SE = self._normalise(x_SD) @ layer.qkv
            pairs = qkv_SE[:, :rotated].view(len(x_SD), -1, self.head // 2, 2)
            torch.view_as_complex(pairs).mul_(rope_S1C)
            cache.index_copy_(0, rows_S, qkv_SE[:, queries:])
            x_SD = torch.addmm(x_SD, attend(qkv_SE, cache), layer.out)
            gate_SF, up_SF = (self._normalise(x_SD) @ layer.gate_up).chunk(2, 1)
            x_SD = torch.addmm(x_SD, functional.silu(gate_SF).mul_(up_SF), layer.down)
        return x_SD

    def _normalise(self, x_SD: Tensor) -> Tensor:
        return functional.rms_norm(x_SD, x_SD.shape[1:], None, self.eps)

    def _read_out(self, x_ND: Tensor) -> Tensor:
        return self._normalise(x_ND).mul_(self.norm) @ self.head_DV

    def _attend_prompt(self, qkv_TE: Tensor) -> Tensor:
        qkv_1RTC = qkv_TE.view(1, len(qkv_TE), -1, self.head).transpose(1, 2)
        q, k, v = torch.split(qkv_1RTC, [self.heads, self.kv_heads, self.kv_heads], 1)
        return attend(q, k, v, None).transpose(1, 2).reshape(len(qkv_TE), -1)

    def _lay_out(self, layer: nn.Module) -> Weights:
        """Folded and transposed; the rows of queries and keys so that turned pairs are neighbours.

        A product of a query and a key does not change when both are permuted alike.
        """
        assert isinstance(layer, Layer)
        rotated = (self.heads + self.kv_heads) * self.head
        qkv_ED = layer.attention.qkv.weight.float() * layer.attention_norm.weight.float()
        halves = qkv_ED[:rotated].view(-1, 2, self.head // 2, qkv_ED.shape[1])
        pairs = halves.transpose(1, 2).reshape(rotated, -1)
        gate_up_FD = layer.ffn.gate_up.weight.float() * layer.ffn_norm.weight.float()
        return Weights(
            _turn(torch.cat([pairs, qkv_ED[rotated:]])),
            _turn(layer.attention.out.weight),
            _turn(gate_up_FD),
            _turn(layer.ffn.down.weight),
        )


def _turn(weight: Tensor) -> Tensor:
    """Transposed in memory, too: products of a few rows are twice as fast."""
    return weight.float().T.contiguous()
