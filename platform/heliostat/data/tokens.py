"""Tokens of texts: a byte-level BPE learned or given, kept by its hash, and packing into blocks."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import (
    AddedToken,
    Encoding,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)

from heliostat.errors import HeliostatError
from heliostat.storage import Missing, Store, connect, join

END = "<|end|>"
# What others call the token that ends a document, where no tokenizer_config.json says it.
OTHER_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
# What says more of a tokenizer.json, the later the sooner believed.
BESIDE = (
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
MIN_FREQUENCY = 2
# The words of a byte-level BPE as GPT-2 has them, but none without end: the time that merges take
# grows with the square of a word, and a sequence of bases or a text without blanks is one.
MAX_WORD = 1024
WORDS = (
    r"'s|'t|'re|'ve|'m|'ll|'d"
    r"| ?\p{L}{1,N}| ?\p{N}{1,N}| ?[^\s\p{L}\p{N}]{1,N}|\s{1,N}(?!\S)|\s{1,N}"
).replace("{1,N}", f"{{1,{MAX_WORD}}}")
MAX_TOKENS = 2**22  # ten times as many as the largest vocabularies have
CHARACTERS_PER_CALL = 2**21  # the tokenizer needs some 120 bytes for each
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Vocabulary:
    """What is known of a tokenizer without it; `token_bytes` is the text's bytes per token id.

    `chat_template` is a Jinja template, "" where there is none beside it.
    """

    sha256: str
    size: int
    end: int
    token_bytes: tuple[int, ...]
    chat_template: str = ""


@dataclass(frozen=True)
class Token:
    """A token of a text; `is_mark` says that the model expects it, and that it is no text.

    `start` and `end` are its place in the text, in characters.
    """

    id: int
    name: str
    start: int
    end: int
    is_mark: bool


def learn_tokenizer(texts: Iterable[str], size: int) -> bytes:
    """A byte-level BPE of at most `size` tokens as tokenizer.json; equal texts, equal bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=MIN_FREQUENCY,
        show_progress=False,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    written: str = tokenizer.to_str()
    return written.encode()


def parse_tokenizer(data: bytes, origin: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json, without padding or cutting of its own.

    A special token that a text spells out is read as text: a document cannot end itself.

    Raises:
        HeliostatError: the file, named by `origin`, is not such a file.
    """
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library knows no narrower one
        raise HeliostatError(f"{origin} is not a tokenizer.json: {str(error)[:200]}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def read_tokenizer(uri: str) -> tuple[bytes, dict[str, Any]]:
    """A tokenizer.json, named itself or by its folder, and what the files beside it say of it.

    Raises:
        HeliostatError: there is no such object.
    """
    folder, _, name = uri.rpartition("/") if uri.endswith(".json") else (uri, "", "tokenizer.json")
    store = connect(folder or ".")
    beside: dict[str, Any] = {}
    for file in BESIDE:
        beside |= _read_object(store, file)
    with suppress(Missing, ValueError):
        beside["chat_template"] = store.read("chat_template.jinja").decode()
    try:
        return store.read(name), beside
    except Missing as error:
        raise HeliostatError(
            f"data.text.tokenizer: there is no {name} in {store.uri}: name a tokenizer.json or the "
            "folder that holds one"
        ) from error


def guard_end(data: bytes, beside: dict[str, Any], origin: str) -> bytes:
    """A tokenizer.json in which no text becomes the token that ends a document by spelling it.

    Raises:
        HeliostatError: as `describe_tokenizer`, or its model itself makes that token of a text.
    """
    end = _find_end(parse_tokenizer(data, origin).get_vocab(True), beside, origin)
    if not _is_spelled(data, end, origin):
        return data
    tokenizer = Tokenizer.from_buffer(data)
    name = tokenizer.id_to_token(end)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    guarded: str = tokenizer.to_str()
    if _is_spelled(guarded.encode(), end, origin):
        raise HeliostatError(
            f"{origin} makes {name!r}, which ends a document, of a text that spells it: name a "
            "token as eos_token in a tokenizer_config.json beside it that no text becomes"
        )
    return guarded.encode()


def _is_spelled(data: bytes, token: int, origin: str) -> bool:
    tokenizer = parse_tokenizer(data, origin)
    spelled = tokenizer.encode(tokenizer.id_to_token(token), add_special_tokens=False)
    return token in spelled.ids


def describe_tokenizer(data: bytes, beside: dict[str, Any], origin: str) -> Vocabulary:
    """The vocabulary of a tokenizer.json; `beside` is what `read_tokenizer` found.

    A model stored beside it may have more rows than there are tokens, or none for special tokens
    that no text has, such as one to pad with: its rows count.

    Raises:
        HeliostatError: it is no tokenizer, has no token that ends a document, or too many tokens.
    """
    tokenizer = parse_tokenizer(data, origin)
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    end = _find_end(ids, beside, origin)
    special = _list_special(tokenizer)
    size = max(ids.values()) + 1
    if isinstance(rows := beside.get("vocab_size"), int):
        size = max(rows, end + 1, *(id + 1 for id in ids.values() if id not in special))
    if size > MAX_TOKENS:
        raise HeliostatError(
            f"{origin} and the config.json beside it have {size:,} tokens, at most {MAX_TOKENS:,} "
            "are taken"
        )
    return Vocabulary(
        sha256(data).hexdigest(),
        size,
        end,
        _count_bytes(tokenizer, ids, size),
        _find_template(beside),
    )


def store_tokenizer(store: Store, data: bytes) -> None:
    """Keep it where `load_tokenizer` looks for it."""
    if store.stat(key := _key(sha256(data).hexdigest())) is None:
        store.write(key, data)


def load_tokenizer(store: Store, digest: str) -> Tokenizer:
    """The tokenizer with this SHA-256 (hex).

    Raises:
        HeliostatError: it is missing, or its bytes are others.
    """
    return _load_tokenizer(store, digest)  # type: ignore[arg-type]


@lru_cache(maxsize=8)
def _load_tokenizer(store: Store, digest: str) -> Tokenizer:
    return parse_tokenizer(read_stored(store, digest), join(store.uri, _key(digest)))


def read_stored(store: Store, digest: str) -> bytes:
    """The tokenizer.json with this SHA-256 (hex), else as `load_tokenizer`."""
    data = store.read(_key(digest))
    if sha256(data).hexdigest() != digest:
        raise HeliostatError(
            f"{join(store.uri, _key(digest))} is not the tokenizer that was stored: delete the "
            "object and prepare the data again"
        )
    return data


def refuse_other_tokenizer(store: Store, digest: str, folder: str) -> None:
    """Weights with a tokenizer.json beside them know the tokens by its ids alone.

    Raises:
        HeliostatError: the one in `folder` gives another id to a token of the stored one.
    """
    beside = connect(folder)
    if beside.stat("tokenizer.json") is None:
        return
    ours = load_tokenizer(store, digest).get_vocab(with_added_tokens=True)
    origin = join(beside.uri, "tokenizer.json")
    theirs = parse_tokenizer(beside.read("tokenizer.json"), origin).get_vocab(True)
    for token, id in sorted(ours.items(), key=itemgetter(1)):
        if theirs.get(token) != id:
            known = f"token {theirs[token]}" if token in theirs else "unknown"
            raise HeliostatError(
                f"the weights at {folder} were trained with another tokenizer than the data was "
                f"prepared with: {token!r}, token {id} of the data, is {known} there: prepare the "
                f"data with data.text.tokenizer={folder}"
            )


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], length: int | None = None
) -> list[Ids]:
    """The token ids of each text: bare, or cut to `length` with the marks that a model expects.

    There is at least one; a text of which the tokenizer keeps nothing is token 0.
    """
    ids: list[Ids] = []
    for part in _group(texts):
        encoded = tokenizer.encode_batch_fast(part, add_special_tokens=False)
        if length is not None:
            encoded = [_cut(tokenizer, text, length) for text in encoded]
        ids += [np.array(text.ids or [0], np.int32) for text in encoded]
    return ids


def locate_tokens(tokenizer: Tokenizer, text: str, length: int) -> list[Token]:
    """The tokens that `encode_texts` gives for one text, each with its place in the text."""
    encoded = _cut(tokenizer, tokenizer.encode(text, add_special_tokens=False), length)
    found = zip(
        encoded.ids, encoded.tokens, encoded.offsets, encoded.special_tokens_mask, strict=True
    )
    return [Token(id, name, *place, bool(mark)) for id, name, place, mark in found]


def spell_token(tokenizer: Tokenizer, id: int) -> bytes:
    """The bytes that a token adds to a text which has begun, also if they are no whole character.

    There are none for an id that is no token's.
    """
    name: str = tokenizer.id_to_token(id) or ""
    if isinstance(tokenizer.decoder, decoders.ByteLevel):
        letters = _number_letters()
        is_text = not letters.keys() >= set(name)  # one that was added to the vocabulary
        return name.encode() if is_text else bytes(letters[letter] for letter in name)
    alone: str = tokenizer.decode([id], skip_special_tokens=False)
    if BYTE_TOKEN.fullmatch(name) and alone != name:
        return bytes.fromhex(name[3:5])
    # Decoders leave out the blank before a first token, or the mark of one that goes on.
    twice: str = tokenizer.decode([id, id], skip_special_tokens=False)
    return twice[len(alone) :].encode()


def pack(documents: Sequence[Ids], length: int, end: int) -> tuple[Ids, list[tuple[int, int]]]:
    """Documents, each closed by `end`, in blocks (N, length); where each block begins.

    That is a pair: the document, and how many of its tokens stand before. The last block is filled
    up with `end`; one that would hold nothing else is left out.
    """
    closed = [np.append(document, np.int32(end)) for document in documents]
    stops = np.cumsum([len(document) for document in closed])
    flat = np.concatenate(closed)
    used = len(flat) - (len(flat) % length == 1)
    blocks = np.full(-(-used // length) * length, end, np.int32)
    blocks[:used] = flat[:used]
    first = np.arange(0, used, length)
    places = np.searchsorted(stops, first, side="right")
    offsets = first - (stops - [len(document) for document in closed])[places]
    return blocks.reshape(-1, length), list(zip(places.tolist(), offsets.tolist(), strict=True))


def find_targets(blocks_NT: NDArray[Any], end: int) -> tuple[NDArray[np.bool_], NDArray[Any]]:
    """Which tokens (N, T - 1) are followed by one to predict, and what follows every token."""
    return blocks_NT[:, :-1] != end, blocks_NT[:, 1:]


def _cut(tokenizer: Tokenizer, text: Encoding, length: int) -> Encoding:
    """The first tokens and the marks, `length` in all.

    The tokenizer itself is told of no length: models of several lengths share it, and threads do.
    """
    text.truncate(length - tokenizer.num_special_tokens_to_add(False))
    return tokenizer.post_process(text)


def _group(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in lists of at most CHARACTERS_PER_CALL, or of one text."""
    part, size = list[str](), 0
    for text in texts:
        size += len(text)
        if part and size > CHARACTERS_PER_CALL:
            yield part
            part, size = [], len(text)
        part.append(text)
    if part:
        yield part


@lru_cache(maxsize=1)
def _number_letters() -> dict[str, int]:
    """The byte of each letter of a byte-level BPE: its own if it can be seen, else one in turn."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    seen = {letter: ord(letter) for letter in letters if ord(letter) < 256}
    unseen = sorted(set(range(256)) - set(seen.values()))
    return seen | dict(zip(letters[len(seen) :], unseen, strict=True))


def _key(digest: str) -> str:
    return f"blobs/{digest}"


def _find_template(beside: dict[str, Any]) -> str:
    """The template, one named "default" of several, with the beginning token that it may name."""
    given = beside.get("chat_template") or ""
    if isinstance(given, list):
        named = (one for one in given if isinstance(one, dict) and one.get("name") == "default")
        given = next(named, {}).get("template")
    if not isinstance(given, str):
        return ""
    begin = beside.get("bos_token")
    begin = begin.get("content") if isinstance(begin, dict) else begin
    # The line end is taken away with the tag, and not one that the template begins with.
    return f"{{% set bos_token = {json.dumps(begin or '')} %}}\n{given}" if given else ""


def _read_object(store: Store, name: str) -> dict[str, Any]:
    """A JSON object; {} where there is none of this name."""
    with suppress(Missing, ValueError):
        found = json.loads(store.read(name))
        if isinstance(found, dict):
            return found
    return {}


def _find_end(ids: dict[str, int], beside: dict[str, Any], origin: str) -> int:
    named = beside.get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    numbered = beside.get("eos_token_id")
    numbered = numbered[0] if isinstance(numbered, list) and numbered else numbered
    by_number = next((name for name, id in ids.items() if id == numbered), None)
    for name in (named, by_number, END, *OTHER_ENDS):
        if isinstance(name, str) and name in ids:
            return ids[name]
    raise HeliostatError(
        f"{origin} has no token that ends a document, such as {OTHER_ENDS[0]}: name it as "
        "eos_token in a tokenizer_config.json beside it"
    )


def _list_special(tokenizer: Tokenizer) -> set[int]:
    return {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def _count_bytes(tokenizer: Tokenizer, ids: dict[str, int], size: int) -> tuple[int, ...]:
    """A special token stands for no text; one of a byte-level BPE has a character for each byte."""
    counts = np.zeros(size, np.int64)
    is_bytes = isinstance(tokenizer.decoder, decoders.ByteLevel)
    special = _list_special(tokenizer)
    for token, id in ids.items():
        if id not in special:
            counts[id] = len(token) if is_bytes else _count_spelled(token)
    return tuple(counts.tolist())


def _count_spelled(token: str) -> int:
    """Bytes of a token that is spelled as text, with marks for a blank or for none before it."""
    if BYTE_TOKEN.fullmatch(token):
        return 1
    return len(token.replace("\u2581", " ").removeprefix("##").encode())
