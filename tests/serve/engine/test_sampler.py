"""How a token is chosen: as the definitions of top-k, top-p, temperature and penalty say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from heliostat.serve.engine.ask import Ask, Sampling
from heliostat.serve.engine.sampler import choose, penalise
from heliostat.serve.engine.scheduler import Stream

VOCAB = 12
LOGITS = torch.randn(VOCAB, generator=torch.manual_seed(2)) * 2


def make_stream(sampling: Sampling, prompt: tuple[int, ...] = (0,)) -> Stream:
    return Stream(Ask(prompt, 10, frozenset(), sampling))


def count(sampling: Sampling, draws: int = 4000) -> Tensor:
    """How often each token is drawn, as a share."""
    streams = [make_stream(sampling)] * draws
    ids = [token.id for token in choose(LOGITS.expand(draws, -1), streams)]
    return torch.bincount(torch.tensor(ids), minlength=VOCAB) / draws


def expect(temperature: float, kept: int) -> Tensor:
    weights = (LOGITS / temperature).softmax(0)
    weights[weights.argsort(descending=True)[kept:]] = 0
    return weights / weights.sum()


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (2.0, 4), (1.0, 1)])
def test_tokens_come_as_often_as_they_are_likely(temperature: float, top_k: int) -> None:
    shares = count(Sampling(temperature, top_k, seed=1))
    assert (shares - expect(temperature, top_k or VOCAB)).abs().max() < 0.03


@given(top_p=st.floats(0.01, 1), top_k=st.integers(0, VOCAB))
def test_top_p_keeps_the_fewest_that_make_it_up_among_the_top_k(top_p: float, top_k: int) -> None:
    likely = expect(1.0, top_k or VOCAB).sort(descending=True)
    before = likely.values.cumsum(0) - likely.values
    allowed = set(likely.indices[(before < top_p + 1e-6) & (likely.values > 0)].tolist())
    drawn = count(Sampling(top_p=top_p, top_k=top_k, seed=1), draws=200).nonzero()[:, 0]
    assert set(drawn.tolist()) <= allowed


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-7])
def test_cold_is_the_likeliest(temperature: float) -> None:
    assert count(Sampling(temperature, seed=1), 5)[LOGITS.argmax()] == 1


@given(temperature=st.floats(1e-6, 1e300), logits=st.lists(st.floats(-1e30, 1e30), min_size=2))
def test_no_temperature_draws_what_is_not_there(temperature: float, logits: list[float]) -> None:
    stream = make_stream(Sampling(min(temperature, 2.0), top_p=0.9, seed=1))
    (token,) = choose(torch.tensor([logits], dtype=torch.float32), [stream])
    assert 0 <= token.id < len(logits)


def test_the_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    stream = make_stream(Sampling(repetition_penalty=1.7), (3, 5, 3))
    stream.made.append(7)
    logits = LOGITS[None]
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[3, 5, 3, 7]]), logits.clone())
    assert torch.equal(penalise(logits, [stream]), theirs)
    assert torch.equal(logits, LOGITS[None])
