"""The decoder-only transformer in the shape of Llama, over blocks of packed documents.

Shapes: N rows, T tokens, D width, H query heads, K key and value heads, C width of a head,
F width of the feed-forward layer.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from heliostat.models.dropout import Dropout
from heliostat.models.example import is_hollow
from heliostat.signature import Blocks, Signature
from heliostat.spec import GptSpec, RopeScalingSpec

INIT_STD = 0.02
FFN_MULTIPLE = 64
FLEX_MIN_HEAD = 16  # the narrowest head that the fused kernel takes

# Which earlier tokens a token sees: None is all of them, a tensor is True where it looks.
Sight = Tensor | BlockMask | None


def build_gpt(spec: GptSpec, signature: Signature, width: int) -> nn.Module:
    """The network of `spec`; from tokens (N, T) it gives logits (N, T, width)."""
    assert isinstance(signature.input, Blocks)
    network = Gpt(spec, width, signature.input.end)
    network.apply(functools.partial(_initialise, layers=spec.layers))
    return network


def ffn_width(spec: GptSpec) -> int:
    """What was asked for, or 8/3 of the width (Shazeer 2020, section 3) up to a multiple of 64."""
    return spec.ffn or FFN_MULTIPLE * math.ceil(8 * spec.width / 3 / FFN_MULTIPLE)


class Gpt(nn.Module):
    """Layers in pre-norm order (Touvron et al. 2023, section 2.2) and a head, tied or not.

    Documents are closed by the token `end`, and a token sees its own document only. Positions do
    not restart with a document: attention under rotary embeddings depends on differences of
    positions alone, so each document is treated as if it stood first in its block.
    """

    def __init__(self, spec: GptSpec, vocab: int, end: int) -> None:
        super().__init__()
        self.end = end
        self.rope = functools.partial(
            rotary, spec.width // spec.heads, spec.rope_theta, spec.rope_scaling
        )
        self.flexible = spec.width // spec.heads >= FLEX_MIN_HEAD
        self.embed = nn.Embedding(vocab, spec.width)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))
        self.norm = RmsNorm(spec.width, spec.norm_eps)
        self.head = None if spec.tied else nn.Linear(spec.width, vocab, bias=False)

    def forward(self, tokens_NT: Tensor) -> Tensor:
        sight = see(tokens_NT, self.end, self.flexible)
        rope_2TC = self.rope(tokens_NT.shape[1], tokens_NT.device)
        x_NTD = _to_autocast(self.embed(tokens_NT))
        for layer in self.layers:
            x_NTD = layer(x_NTD, rope_2TC, sight)
        weight_VD = self.embed.weight if self.head is None else self.head.weight
        return functional.linear(self.norm(x_NTD), weight_VD)


class Layer(nn.Module):
    def __init__(self, spec: GptSpec) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(spec.width, spec.norm_eps)
        self.attention = Attention(spec.width, spec.heads, spec.kv_heads or spec.heads)
        self.ffn_norm = RmsNorm(spec.width, spec.norm_eps)
        self.ffn = SwiGlu(spec.width, ffn_width(spec))
        self.attention_dropout, self.ffn_dropout = Dropout(spec.dropout), Dropout(spec.dropout)

    def forward(self, x_NTD: Tensor, rope_2TC: Tensor, sight: Sight) -> Tensor:
        mixed_NTD = self.attention(self.attention_norm(x_NTD), rope_2TC, sight)
        x_NTD = x_NTD + self.attention_dropout(mixed_NTD)
        fed_NTD: Tensor = self.ffn_dropout(self.ffn(self.ffn_norm(x_NTD)))
        return x_NTD + fed_NTD


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): H / K query heads share a key and a value."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * (width // heads), bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_NTD: Tensor, rope_2TC: Tensor, sight: Sight) -> Tensor:
        rotated = self.heads + self.kv_heads
        qkv_NTSC = self.qkv(x_NTD).unflatten(2, (rotated + self.kv_heads, -1))
        qk_NTRC = rotate(qkv_NTSC[:, :, :rotated], rope_2TC)
        q_NHTC = qk_NTRC[:, :, : self.heads].transpose(1, 2)
        k_NKTC = qk_NTRC[:, :, self.heads :].transpose(1, 2)
        v_NKTC = qkv_NTSC[:, :, rotated:].transpose(1, 2)
        seen_NHTC = attend(q_NHTC, k_NKTC, v_NKTC, sight)
        seen_NTD: Tensor = self.out(seen_NHTC.transpose(1, 2).flatten(2))
        return seen_NTD


class RmsNorm(nn.RMSNorm):
    """Root mean square norm (Zhang & Sennrich 2019), in float32 whatever comes in, and back."""

    def forward(self, x_NTD: Tensor) -> Tensor:
        weight_D = self.weight.float()
        return functional.rms_norm(
            x_NTD.float(), self.normalized_shape, weight_D, self.eps
        ).type_as(x_NTD)


class SwiGlu(nn.Module):
    """SiLU(x G) * (x U), then down (Shazeer 2020, equation 6); G and U are one matrix."""

    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(self, x_NTD: Tensor) -> Tensor:
        gate_NTF, up_NTF = self.gate_up(x_NTD).chunk(2, dim=-1)
        down_NTD: Tensor = self.down(functional.silu(gate_NTF) * up_NTF)
        return down_NTD


def see(tokens_NT: Tensor, end: int, flexible: bool = True) -> Sight:
    """What the tokens of packed documents see; nothing here waits for a GPU.

    On a GPU the mask is sparse by blocks, and without an `end` inside it costs what causal
    attention costs. On a CPU the values are at hand, so plain causal attention is told at once.
    Tokens that have no values stand for a block of one document.
    """
    if is_hollow(tokens_NT):
        return None
    ends_NT = tokens_NT[:, :-1] == end
    if tokens_NT.device.type == "cpu" and not torch.compiler.is_compiling() and not ends_NT.any():
        return None
    document_NT = functional.pad(ends_NT.cumsum(dim=1), (1, 0))
    if flexible and tokens_NT.is_cuda and len(tokens_NT):
        return see_in_blocks(document_NT)
    same_NTT = document_NT[:, :, None] == document_NT[:, None, :]
    return same_NTT.tril().unsqueeze(1)


def see_in_blocks(document_NT: Tensor) -> BlockMask:
    """The same as a mask of blocks, which `attend` skips where no token sees another."""

    def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_NT[row, query] == document_NT[row, key])

    rows, length = document_NT.shape
    return create_block_mask(sees, rows, None, length, length, device=document_NT.device)


def attend(q_NHTC: Tensor, k_NKTC: Tensor, v_NKTC: Tensor, sight: Sight) -> Tensor:
    """Scaled dot-product attention, (N, H, T, C)."""
    if isinstance(sight, BlockMask):
        # Eagerly it would build all scores; inside a compiled network it is compiled with it.
        compiling = torch.compiler.is_compiling()
        flex: Any = flex_attention if compiling else _compile_flex()
        seen_NHTC: Tensor = flex(q_NHTC, k_NKTC, v_NKTC, block_mask=sight, enable_gqa=True)
        return seen_NHTC
    return functional.scaled_dot_product_attention(
        q_NHTC, k_NKTC, v_NKTC, attn_mask=sight, is_causal=sight is None, enable_gqa=True
    )


def rotary(
    head: int, theta: float, scaling: RopeScalingSpec | None, length: int, device: torch.device
) -> Tensor:
    """Cosines and sines of every position's angles, float32 (2, T, C) (Su et al. 2021, eq. 34).

    Dimension i turns together with i + C/2, as in Hugging Face's layout of Llama.
    """
    steps = torch.arange(0, head, 2, dtype=torch.float32, device=device) / head
    frequencies = theta**-steps
    if scaling is not None:
        frequencies = _stretch(frequencies, scaling)
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles_TC = (positions[:, None] * frequencies).repeat(1, 2)
    return torch.stack([angles_TC.cos(), angles_TC.sin()])


def rotate(x_NTRC: Tensor, rope_2TC: Tensor) -> Tensor:
    """Turn each pair of dimensions by its position's angle, in float32 and back."""
    cos_T1C, sin_T1C = rope_2TC.unsqueeze(2)
    left, right = x_NTRC.chunk(2, dim=-1)
    turned_NTRC: Tensor = x_NTRC * cos_T1C + torch.cat([-right, left], dim=-1) * sin_T1C
    return turned_NTRC.type_as(x_NTRC)


def _stretch(frequencies: Tensor, scaling: RopeScalingSpec) -> Tensor:
    """Low frequencies divided by a factor, high ones kept, those between blended.

    As Llama 3.1 was trained (Grattafiori et al. 2024 and its published configuration).
    """
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _initialise(module: nn.Module, layers: int) -> None:
    """Normal(0, 0.02), and what adds to the residual stream smaller by the root of its 2 * layers
    terms (Radford et al. 2019, section 2.3)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, Attention | SwiGlu):
        last = module.out if isinstance(module, Attention) else module.down
        nn.init.normal_(last.weight, std=INIT_STD / math.sqrt(2 * layers))


def _to_autocast(x: Tensor) -> Tensor:
    """An embedding is a look-up and no operation of autocast: without this the residual stream
    would stay in float32 and every layer read and write twice the bytes."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


@functools.cache
def _compile_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)
