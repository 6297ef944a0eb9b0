"""Pieces of text: together they are the text, and a stop string is never seen, not even begun."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordPiece

from heliostat.data.tokens import END, parse_tokenizer, spell_token
from heliostat.serve.engine.text import Spelling
from writing import TOKENIZER, VOCAB

TOKENS = parse_tokenizer(TOKENIZER, "the tests")
PROMPT = tuple(TOKENS.encode("a field of").ids)
texts = st.text(alphabet="ab ☀éx", max_size=40)


def spell(text: str, stops: tuple[str, ...]) -> tuple[list[str], bool]:
    spelling = Spelling(TOKENS, PROMPT, stops)
    pieces = []
    for token in TOKENS.encode(text).ids:
        pieces.append(spelling.add(token))
        if spelling.stopped:
            return pieces, True
    pieces.append(spelling.finish())
    return pieces, spelling.stopped


@given(text=texts)
def test_the_pieces_are_the_text(text: str) -> None:
    pieces, stopped = spell(text, ())
    assert "".join(pieces) == text
    assert not stopped


@given(ids=st.lists(st.integers(1, VOCAB - 1), max_size=20))
def test_any_tokens_are_spelled_as_the_tokenizer_does(ids: list[int]) -> None:
    spelling = Spelling(TOKENS, PROMPT)
    pieces = [spelling.add(token) for token in ids] + [spelling.finish()]
    whole = TOKENS.decode([*PROMPT, *ids])[len("a field of") :]
    assert "".join(pieces) == whole


def make_bytewise() -> Tokenizer:
    """As of Llama 2: what is not in the vocabulary is bytes, which are decoded all or none."""
    vocab = {"<unk>": 0, "\u2581of": 1, "a": 2, "b": 3}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return tokenizer


def make_wordwise() -> Tokenizer:
    tokenizer = Tokenizer(WordPiece(vocab={"[UNK]": 0, "the": 1, "##ing": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


BYTEWISE = make_bytewise()


@given(prompt=st.text(alphabet="ab☀é😀", max_size=12), text=st.text(alphabet="ab☀é😀", max_size=24))
def test_bytes_that_are_decoded_together_are_spelled_too(prompt: str, text: str) -> None:
    before = [1, *BYTEWISE.encode(prompt).ids]
    spelling = Spelling(BYTEWISE, before)
    said = [spelling.add(token) for token in BYTEWISE.encode(text).ids] + [spelling.finish()]
    assert "".join(said) == text


@given(text=texts)
def test_the_bytes_of_tokens_are_those_of_the_text(text: str) -> None:
    for tokenizer, plain in ((TOKENS, text), (BYTEWISE, text.translate({32: None, 120: None}))):
        spelled = [spell_token(tokenizer, id) for id in tokenizer.encode(plain).ids]
        assert b"".join(spelled) == plain.encode()


@pytest.mark.parametrize(
    ("tokenizer", "token", "said"),
    [
        (TOKENS, END, END.encode()),
        (TOKENS, "Ġ", b" "),
        (BYTEWISE, "\u2581of", b" of"),
        (BYTEWISE, "<0xE2>", b"\xe2"),
        (make_wordwise(), "the", b" the"),
        (make_wordwise(), "##ing", b"ing"),
    ],
)
def test_a_token_is_spelled_as_inside_a_text(tokenizer: Tokenizer, token: str, said: bytes) -> None:
    assert spell_token(tokenizer, tokenizer.get_vocab()[token]) == said


def test_a_row_without_a_token_has_no_bytes() -> None:
    assert spell_token(TOKENS, VOCAB + 1) == b""


@given(text=texts, stops=st.lists(st.text(alphabet="ab ☀é", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop(text: str, stops: list[str]) -> None:
    pieces, stopped = spell(text, tuple(stops))
    found = [text.find(stop) for stop in stops if stop in text]
    assert stopped == bool(found)
    said = "".join(pieces)
    if not stopped:
        assert said == text
    else:
        assert text.startswith(said)
        assert not any(stop in said for stop in stops)
        assert any(text[len(said) :].startswith(stop) for stop in stops)
