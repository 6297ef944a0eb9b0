"""The bidirectional transformer in the shape of BERT, over whole texts.

Shapes: N texts, T tokens, D width, H heads, C width of a head.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from heliostat.errors import HeliostatError
from heliostat.models.dropout import Dropout
from heliostat.signature import Signature, Text
from heliostat.spec import EncoderSpec

INIT_STD = 0.02


def build_encoder(spec: EncoderSpec, signature: Signature, width: int) -> nn.Module:
    """The network of `spec`; from ids (N, T) and lengths (N,) it gives (N, width).

    Raises:
        HeliostatError: the texts may be longer than the positions.
    """
    text = signature.input
    assert isinstance(text, Text)
    if text.length > spec.max_positions:
        raise HeliostatError(
            f"the data has texts of up to {text.length} tokens and model.max_positions is "
            f"{spec.max_positions}: raise it, or lower data.text.block"
        )
    network = Encoder(spec, text.vocab, width)
    network.apply(_initialise)
    return network


def ffn_width(spec: EncoderSpec) -> int:
    """What was asked for, or four times the width (Devlin et al. 2019, section 3)."""
    return spec.ffn or 4 * spec.width


class Encoder(nn.Module):
    """Layers in post-norm order (Devlin et al. 2019), pooled to a vector of each text, and a head.

    Every token is of segment 0; there are others so that published weights fit.
    """

    def __init__(self, spec: EncoderSpec, vocab: int, width: int) -> None:
        super().__init__()
        self.pool: Literal["mean", "first"] = spec.pool
        self.tokens = nn.Embedding(vocab, spec.width)
        self.positions = nn.Embedding(spec.max_positions, spec.width)
        self.segments = nn.Embedding(spec.segments, spec.width)
        self.norm = nn.LayerNorm(spec.width, spec.norm_eps)
        self.dropout = Dropout(spec.dropout)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))
        self.head = nn.Linear(spec.width, width)

    def forward(self, ids_NT: Tensor, lengths_N: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(ids_NT, lengths_N))
        return logits

    def embed(self, ids_NT: Tensor, lengths_N: Tensor) -> Tensor:
        """A vector of each text, (N, D): the mean of its tokens' or that of its first token."""
        places_T = torch.arange(ids_NT.shape[1], device=ids_NT.device)
        valid_NT = places_T < lengths_N[:, None]
        seen_N11T = valid_NT[:, None, None, :]
        x_NTD: Tensor = self.tokens(ids_NT) + self.positions(places_T) + self.segments.weight[0]
        x_NTD = self.dropout(self.norm(x_NTD))
        for layer in self.layers:
            x_NTD = layer(x_NTD, seen_N11T)
        if self.pool == "first":
            return x_NTD[:, :1].sum(dim=1)  # a batch without texts may have no first token
        total_ND: Tensor = (x_NTD * valid_NT.unsqueeze(2)).sum(dim=1)
        return total_ND / lengths_N.clamp(min=1).unsqueeze(1)


class Layer(nn.Module):
    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.attention = Attention(spec.width, spec.heads)
        self.attention_norm = nn.LayerNorm(spec.width, spec.norm_eps)
        self.up = nn.Linear(spec.width, ffn_width(spec))
        self.down = nn.Linear(ffn_width(spec), spec.width)
        self.ffn_norm = nn.LayerNorm(spec.width, spec.norm_eps)
        self.attention_dropout, self.ffn_dropout = Dropout(spec.dropout), Dropout(spec.dropout)

    def forward(self, x_NTD: Tensor, seen_N11T: Tensor) -> Tensor:
        mixed_NTD = self.attention_dropout(self.attention(x_NTD, seen_N11T))
        x_NTD = self.attention_norm(x_NTD + mixed_NTD)
        fed_NTD = self.ffn_dropout(self.down(functional.gelu(self.up(x_NTD))))
        normal_NTD: Tensor = self.ffn_norm(x_NTD + fed_NTD)
        return normal_NTD


class Attention(nn.Module):
    """Every token looks at every valid one of its text (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_NTD: Tensor, seen_N11T: Tensor) -> Tensor:
        qkv_NT3HC = self.qkv(x_NTD).unflatten(2, (3, self.heads, -1))
        q_NHTC, k_NHTC, v_NHTC = qkv_NT3HC.permute(2, 0, 3, 1, 4)
        mixed_NHTC = functional.scaled_dot_product_attention(
            q_NHTC, k_NHTC, v_NHTC, attn_mask=seen_N11T
        )
        mixed_NTD: Tensor = self.out(mixed_NHTC.transpose(1, 2).flatten(2))
        return mixed_NTD


def _initialise(module: nn.Module) -> None:
    """Normal(0, 0.02), biases zero, as BERT was initialised."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
