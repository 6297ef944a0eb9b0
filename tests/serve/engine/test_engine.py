"""The engine's tokens are the model's own, whoever shares the batch, comes or leaves."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat import export
from heliostat.serve.engine.ask import Ask, Sampling
from heliostat.serve.engine.engine import TURN_SECONDS, Engine
from heliostat.serve.engine.scheduler import PREFILL_TOKENS, Stream
from writing import BLOCKS, LENGTH, NETWORKS, SPECS, TOKENIZER, VOCAB, make_engine

GREEDY = Sampling(temperature=0)
WARM = Sampling(temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.2, seed=7)


def make_prompts(count: int, longest: int = 12) -> list[tuple[int, ...]]:
    generator = torch.manual_seed(count)
    return [
        tuple(torch.randint(1, VOCAB, (1 + 5 * i % longest,), generator=generator).tolist())
        for i in range(count)
    ]


@pytest.fixture(params=SPECS)
def llama(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any]:
    from transformers import LlamaForCausalLM

    name = request.param
    weights = NETWORKS[name].state_dict()
    for file, data in export.to_hf_files(SPECS[name], BLOCKS, weights, TOKENIZER).items():
        (tmp_path / file).write_bytes(data)
    return name, LlamaForCausalLM.from_pretrained(tmp_path)


def test_greedy_tokens_are_those_of_transformers(llama: tuple[str, Any]) -> None:
    name, theirs = llama
    prompts = make_prompts(7)
    asks = [Ask(prompt, 20, frozenset({BLOCKS.end}), GREEDY) for prompt in prompts]
    together = make_engine(name, slots=3).generate(asks)
    for prompt, ask, tokens in zip(prompts, asks, together, strict=True):
        found = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=BLOCKS.end,
        )
        assert tokens == found[0, len(prompt) :].tolist()
        assert make_engine(name, slots=1).generate([ask]) == [tokens]


@pytest.mark.parametrize("sampling", [GREEDY, WARM, Sampling(seed=3), Sampling(top_p=0.5, seed=1)])
@given(data=st.data())
@settings(max_examples=6, deadline=None)
def test_a_stream_does_not_depend_on_its_neighbours(
    sampling: Sampling, data: st.DataObject
) -> None:
    prompts = make_prompts(6)
    mine = Ask(prompts[3], 12, frozenset(), sampling)
    alone = make_engine().generate([mine])[0]
    engine, stream = make_engine(slots=3), Stream(mine)
    comers = data.draw(st.lists(st.integers(0, 10), min_size=2, max_size=5), label="comers")
    leaving = data.draw(st.lists(st.integers(0, 10), max_size=3), label="leaving")
    others = [Stream(Ask(prompts[i % 6], 1 + i, frozenset(), WARM)) for i in comers]
    place = data.draw(st.integers(0, len(others)), label="place")
    order = [*others[:place], stream, *others[place:]]
    for step in range(60):
        if order:
            engine.submit([order.pop(0)])
        for i in leaving:
            if i == step and others:
                others[i % len(others)].left = True
        engine.step()
    assert engine.idle
    assert stream.made == alone


def test_the_same_seed_gives_the_same_and_another_one_another() -> None:
    prompt = make_prompts(1)[0]

    def generate(seed: int | None) -> list[int]:
        sampling = Sampling(temperature=1.5, seed=seed)
        return make_engine().generate([Ask(prompt, 20, frozenset(), sampling)])[0]

    assert generate(5) == generate(5)
    assert len({tuple(generate(seed)) for seed in (5, 6, -1, None, None)}) == 5


def run_until(engine: Engine, stream: Stream, tokens: int) -> None:
    while len(stream.made) < tokens:
        engine.step()


def test_one_that_leaves_is_gone_after_one_step() -> None:
    engine = make_engine(slots=2)
    streams = [Stream(Ask((5,), 30, frozenset(), GREEDY)) for _ in range(3)]
    engine.submit(streams)
    run_until(engine, streams[0], 3)
    streams[0].left = True
    engine.step()
    assert streams[0] not in engine.scheduler.running
    assert len(streams[0].made) == 3
    streams[2].left = True  # it may still wait
    run_until(engine, streams[1], 30)
    assert engine.idle


def test_prompts_hold_up_those_that_run_for_a_turn_at_most() -> None:
    ticks = itertools.count()
    engine = make_engine(slots=16, clock=lambda: next(ticks) * TURN_SECONDS / 3)  # a tick a step
    running = Stream(Ask((5,), 6, frozenset(), GREEDY))
    engine.submit([running])
    engine.step()
    prompt = tuple(range(1, PREFILL_TOKENS // 2 + 2))  # two of them do not fit one step
    others = [Stream(Ask(prompt, 9, frozenset(), GREEDY)) for _ in range(9)]
    engine.submit(others)
    read = []
    for tokens in range(2, 6):
        run_until(engine, running, tokens)
        read.append(sum(bool(one.made) for one in others))
    assert read == [2, 5, 8, 9]


def test_an_end_is_the_last_token_and_the_length_is_a_bound() -> None:
    free = make_engine().generate([Ask((5,), 30, frozenset(), GREEDY)])[0]
    assert len(free) == 30
    end = next(token for token in free if free.index(token) > 3)
    cut = make_engine().generate([Ask((5,), 30, frozenset({end}), GREEDY)])[0]
    assert cut == free[: free.index(end) + 1]


def test_a_context_is_used_to_its_last_token() -> None:
    prompt = tuple(range(1, LENGTH // 2))
    engine = make_engine()
    whole = engine.generate([Ask(prompt, LENGTH - len(prompt), frozenset(), GREEDY)])[0]
    assert len(prompt) + len(whole) == LENGTH
    tokens = torch.tensor([[*prompt, *whole]])
    tokens = tokens.where(tokens != BLOCKS.end, 1)  # the network would begin a new document
    if tokens[0].tolist() == [*prompt, *whole]:
        logits = NETWORKS["tied"](tokens)
        assert logits[0, len(prompt) - 1 : -1].argmax(1).tolist() == whole


def test_log_probabilities_are_the_models_own() -> None:
    prompt = make_prompts(3)[2]
    engine, network = make_engine(), NETWORKS["tied"]
    stream = Stream(Ask(prompt, 6, frozenset(), dataclasses.replace(WARM, logprobs=3)))
    engine.submit([stream])
    made = [one.token for _ in range(6) for one in engine.step()]
    for i, token in enumerate(made):
        with torch.inference_mode():
            row = network(torch.tensor([[*prompt, *stream.made[:i]]]))[0, -1].log_softmax(0)
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-3)
        top, ids = row.topk(3)
        assert [id for id, _ in token.top] == ids.tolist()
        assert [logprob for _, logprob in token.top] == pytest.approx(top.tolist(), abs=1e-3)
