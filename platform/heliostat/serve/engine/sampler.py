"""Logits to tokens, all streams of a step at once.

Shapes: N streams, V vocabulary, P likeliest tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from heliostat.serve.engine.scheduler import Stream

Pick = Callable[[Tensor, Sequence[Stream]], Tensor]


class Token(NamedTuple):
    """A token, its log probability and the likeliest ones (id, log probability), if asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@torch.inference_mode()
def choose(logits_NV: Tensor, streams: Sequence[Stream]) -> list[Token]:
    """The next token of each stream."""
    scores_NV = penalise(logits_NV, streams)
    ids_N = scores_NV.argmax(1)
    for pick, rows in split(streams):
        drawn = [streams[i] for i in rows]
        weights_NV = weigh(scores_NV[rows], drawn)
        ids_N[rows] = pick(weights_NV, drawn)
    tokens = [Token(id) for id in ids_N.tolist()]
    for i, stream in enumerate(streams):
        if stream.ask.sampling.logprobs is not None:
            tokens[i] = tell(logits_NV[i], tokens[i].id, stream.ask.sampling.logprobs)
    return tokens


def penalise(logits_NV: Tensor, streams: Sequence[Stream]) -> Tensor:
    """Logits of tokens that a stream has, in its prompt or after it, made less likely."""
    penalised = [
        i for i, stream in enumerate(streams) if stream.ask.sampling.repetition_penalty != 1
    ]
    if not penalised:
        return logits_NV
    scores_NV = logits_NV.clone()
    for i in penalised:
        stream = streams[i]
        seen = torch.tensor(list({*stream.ask.prompt, *stream.made}))
        penalty = stream.ask.sampling.repetition_penalty
        logits = logits_NV[i, seen]
        scores_NV[i, seen] = torch.where(logits > 0, logits / penalty, logits * penalty)
    return scores_NV


def split(streams: Sequence[Stream]) -> list[tuple[Pick, list[int]]]:
    """Who picks how; nobody's way, and so nobody's token, depends on the others."""
    samplings = [stream.ask.sampling for stream in streams]
    warm = [i for i, sampling in enumerate(samplings) if not sampling.greedy]
    some = [i for i in warm if samplings[i].filters]
    every = [i for i in warm if not samplings[i].filters]
    return [(pick, rows) for pick, rows in ((pick_any, every), (pick_top, some)) if rows]


def weigh(scores_NV: Tensor, streams: Sequence[Stream]) -> Tensor:
    """Probabilities (N, V) at each stream's temperature."""
    temperature_N1 = torch.tensor([[stream.ask.sampling.temperature] for stream in streams])
    # The highest is 0 before it is divided, so no temperature makes it infinite.
    shifted_NV = scores_NV - scores_NV.amax(1, keepdim=True)
    return (shifted_NV / temperature_N1).softmax(1)


def pick_any(weights_NV: Tensor, streams: Sequence[Stream]) -> Tensor:
    """Tokens (N,) by one uniform number of each stream."""
    return _reach(weights_NV, streams)


def pick_top(weights_NV: Tensor, streams: Sequence[Stream]) -> Tensor:
    """The same among the `top_k` and `top_p` of each stream."""
    samplings = [stream.ask.sampling for stream in streams]
    top_k = [sampling.top_k or weights_NV.shape[1] for sampling in samplings]
    weights_NP, ids_NP = weights_NV.topk(max(top_k), 1)
    weights_NP[torch.arange(max(top_k)) >= torch.tensor(top_k)[:, None]] = 0
    top_p_N1 = torch.tensor([[sampling.top_p] for sampling in samplings])
    sums_NP = weights_NP.cumsum(1)
    weights_NP[sums_NP - weights_NP >= top_p_N1 * sums_NP[:, -1:]] = 0
    return ids_NP.gather(1, _reach(weights_NP, streams)[:, None])[:, 0]


def tell(logits_V: Tensor, id: int, alternatives: int) -> Token:
    """The token with the log probabilities that the model gave it and the likeliest ones."""
    logprobs_V = logits_V.log_softmax(0)
    top, ids = logprobs_V.topk(alternatives)
    pairs = tuple(zip(ids.tolist(), top.tolist(), strict=True))
    return Token(id, logprobs_V[id].item(), pairs)


def _reach(weights_NP: Tensor, streams: Sequence[Stream]) -> Tensor:
    """The first place (N,) at which the sum of weights reaches a share in (0, 1] of their total.

    It has a weight above 0, however the sums are rounded.
    """
    share_N1 = torch.tensor([[1 - stream.random.random()] for stream in streams])
    sums_NP = weights_NP.cumsum(1)
    places_N1 = torch.searchsorted(sums_NP, share_N1 * sums_NP[:, -1:])
    return places_N1.clamp_(max=weights_NP.shape[1] - 1)[:, 0]
