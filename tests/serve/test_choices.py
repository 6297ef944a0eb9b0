"""What is told of an answer's tokens: the place of each in the text, and its own bytes."""

from hypothesis import given
from hypothesis import strategies as st

from heliostat.serve.choices import Choice
from heliostat.serve.engine.ask import Ask
from heliostat.serve.engine.engine import Made
from heliostat.serve.engine.sampler import Token
from heliostat.serve.engine.scheduler import Stream
from heliostat.serve.openai import tell_chat, tell_completion
from writing import make_language

LANGUAGE = make_language()
texts = st.text(alphabet="ab ☀éx\U0001f600", max_size=24)


def continue_by(text: str, stops: tuple[str, ...] = ()) -> Choice:
    """The choice after the tokens of `text` and the one that ends a document, or after a stop."""
    ask = Ask(LANGUAGE.encode("rays"), 99, frozenset({LANGUAGE.end}))
    choice, stream = Choice(0, ask, LANGUAGE, stops), Stream(ask)
    for token in (*LANGUAGE.encode(text), LANGUAGE.end):
        finish = "stop" if token == LANGUAGE.end else None
        choice.add(Made(stream, Token(token, -1.0, ((token, -1.0),)), finish))
        if choice.finish:
            break
    return choice


@given(text=texts)
def test_a_token_stands_where_the_text_has_it(text: str) -> None:
    """Parts of a character stand where it begins; what ends the text, where that ends."""
    choice = continue_by(text)
    told = tell_completion(LANGUAGE, tuple(choice.tokens))
    whole, read = text.encode(), 0
    for (token, _), offset in zip(choice.tokens, told["text_offset"], strict=True):
        assert offset == len(whole[:read].decode(errors="ignore"))
        read += len(LANGUAGE.bytes_of(token.id))
    assert told["text_offset"][-1] == len(text)


def test_what_a_stop_takes_back_has_its_place_too() -> None:
    choice = continue_by("ab xx ba", ("xx ",))
    told = tell_completion(LANGUAGE, tuple(choice.tokens))
    assert choice.text == "ab "
    assert told["text_offset"] == sorted(told["text_offset"])
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        assert "ab xx ba".startswith(token, offset)


@given(text=texts)
def test_the_bytes_of_a_chats_tokens_are_those_of_its_text(text: str) -> None:
    rows = tell_chat(LANGUAGE, tuple(continue_by(text).tokens))["content"]
    assert bytes(byte for row in rows[:-1] for byte in row["bytes"]) == text.encode()
    assert all(row["top_logprobs"][0]["bytes"] == row["bytes"] for row in rows)
