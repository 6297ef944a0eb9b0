"""What a step of a decoder computes, as two graphs: each is one call, without the interpreter.

Operation by operation, the event loop beside it would take the interpreter's lock between any two
of them. (TorchScript is deprecated, but what replaces it wants a C++ compiler on every node.)

Shapes: S rows, a token each; N streams, T tokens of a stream, D width, H query heads, K key and
value heads, C width of a head, E = (H + 2K) C, F feed-forward width, L context, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Layer(NamedTuple):
    """Matrices (D, E), (D, D), (D, 2F) and (F, D); those that follow a norm have its weights."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor


class Model(NamedTuple):
    """All weights: embeddings (V, D), the layers, the last norm (D,) and the head (D, V).

    Queries and keys are so permuted that the pairs `rope` (L, 1, C/2) turns, as complex numbers,
    are neighbours.
    """

    embed: Tensor
    layers: list[Layer]
    norm: Tensor
    head: Tensor
    rope: Tensor
    eps: float
    heads: int
    kv_heads: int
    width: int
    context: int


def _project(
    model: Model, layer: Layer, cache: Tensor, x_SD: Tensor, rows_S: Tensor, rope_S1C: Tensor
) -> Tensor:
    """Queries, keys and values (S, E), turned; keys and values are in their rows of the cache."""
    queries = model.heads * model.width
    rotated = queries + model.kv_heads * model.width
    qkv_SE = _normalise(model, x_SD) @ layer.qkv
    pairs = qkv_SE[:, :rotated].view(x_SD.shape[0], -1, model.width // 2, 2)
    torch.view_as_complex(pairs).mul_(rope_S1C)
    cache.index_copy_(0, rows_S, qkv_SE[:, queries:])
    return qkv_SE


def _attend_prompt(model: Model, qkv_TE: Tensor) -> Tensor:
    qkv_1RTC = qkv_TE.view(1, qkv_TE.shape[0], -1, model.width).transpose(1, 2)
    q, k, v = torch.split(qkv_1RTC, [model.heads, model.kv_heads, model.kv_heads], 1)
    seen_1HTC = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return seen_1HTC.transpose(1, 2).reshape(qkv_TE.shape[0], -1)


def _feed(model: Model, layer: Layer, x_SD: Tensor, seen_SD: Tensor) -> Tensor:
    x_SD = torch.addmm(x_SD, seen_SD, layer.out)
    gate_SF, up_SF = (_normalise(model, x_SD) @ layer.gate_up).chunk(2, 1)
    return torch.addmm(x_SD, functional.silu(gate_SF).mul_(up_SF), layer.down)


def _normalise(model: Model, x_SD: Tensor) -> Tensor:
    return functional.rms_norm(x_SD, [x_SD.shape[1]], None, model.eps)


def _read_out(model: Model, x_ND: Tensor) -> Tensor:
    return _normalise(model, x_ND).mul_(model.norm) @ model.head


@torch.jit.script
def decode(
    model: Model, caches: list[Tensor], tokens_N: Tensor, places_N: Tensor, length: int
) -> Tensor:
    """A token for each of the slots 0 to N - 1, at its place below `length`; logits (N, V)."""
    count = tokens_N.shape[0]
    unseen_N11T = (torch.arange(length) > places_N.unsqueeze(1)).unsqueeze(1).unsqueeze(1)
    mask_N11T = torch.zeros([count, 1, 1, length]).masked_fill_(unseen_N11T, float("-inf"))
    rows_N = torch.arange(count) * model.context + places_N
    rope_N1C = model.rope[places_N]
    x_ND = model.embed[tokens_N]
    for layer, cache in zip(model.layers, caches):  # noqa: B905  TorchScript knows no strict
        qkv_NE = _project(model, layer, cache, x_ND, rows_N, rope_N1C)
        kv_NT2KC = cache.view(-1, model.context, 2, model.kv_heads, model.width)[:count, :length]
        kv_2NKTC = kv_NT2KC.permute(2, 0, 3, 1, 4)
        # The query heads that share a key stand where the tokens of a query would.
        queries = model.heads * model.width
        q_NKGC = qkv_NE[:, :queries].view(count, model.kv_heads, -1, model.width)
        seen_NKGC = functional.scaled_dot_product_attention(
            q_NKGC, kv_2NKTC[0], kv_2NKTC[1], attn_mask=mask_N11T
        )
        x_ND = _feed(model, layer, x_ND, seen_NKGC.reshape(count, -1))
    return _read_out(model, x_ND)


@torch.jit.script
def prefill(
    model: Model, caches: list[Tensor], tokens_S: Tensor, lengths: list[int], first_slot: int
) -> Tensor:
    """Whole prompts, one after another, into the slots from `first_slot` on; logits (N, V)."""
    lengths_N = torch.tensor(lengths)
    places_S = torch.cat([torch.arange(length) for length in lengths])
    slots_S = torch.repeat_interleave(lengths_N) + first_slot
    rows_S = slots_S * model.context + places_S
    rope_S1C = model.rope[places_S]
    x_SD = model.embed[tokens_S]
    for layer, cache in zip(model.layers, caches):  # noqa: B905  TorchScript knows no strict
        qkv_SE = _project(model, layer, cache, x_SD, rows_S, rope_S1C)
        seen = [_attend_prompt(model, qkv_TE) for qkv_TE in torch.split(qkv_SE, lengths)]
        x_SD = _feed(model, layer, x_SD, torch.cat(seen))
    return _read_out(model, x_SD[lengths_N.cumsum(0) - 1])
