"""OpenAI's embeddings over the encoders of a shelf: a vector of unit length for each text."""

import asyncio
import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from heliostat.data.features import TOKENS, TextFeatures
from heliostat.models.encoder import Encoder
from heliostat.registry import Version
from heliostat.serve.asking import parse
from heliostat.serve.door import Door
from heliostat.serve.gate import visit_of
from heliostat.serve.openai import read_model
from heliostat.serve.openapi import ANYTHING, TEXT, Paths, a_list, an_object, json_body, operation
from heliostat.serve.replies import JSON_TYPE, Refusal, reply
from heliostat.serve.shelf import COMPUTE_POOL, Served, Shelf
from heliostat.spec import Section

MAX_TEXTS = 1024
LONGEST_TOKEN = 128  # characters: a text of more is refused before it is read


class Embedding(Section):
    model: Annotated[str, Field(max_length=128)]
    input: str | Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_TEXTS)]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.input,) if isinstance(self.input, str) else self.input


def list_routes(shelf: Shelf, door: Door) -> list[Route]:
    async def embed(request: Request, body: bytes) -> Response:
        asked = parse(Embedding, request.headers.get("content-type", ""), body)
        visit, (name, number) = visit_of(request), read_model(asked.model)
        visit.enter(name)
        served = await shelf.get(name, number)
        visit.version = served.version.number
        loop = asyncio.get_running_loop()
        tokens = await loop.run_in_executor(COMPUTE_POOL, read_texts, served, asked.texts)
        columns = {TOKENS: np.fromiter(tokens, dtype=object, count=len(tokens))}
        vectors = await served.embedder.run(columns, len(tokens))
        used = sum(map(len, tokens))
        visit.count(rows=len(tokens), tokens_in=used)
        return reply(
            to_json(
                {
                    "object": "list",
                    "model": served.version.name,
                    "data": [
                        {"object": "embedding", "index": i, "embedding": vector}
                        for i, vector in enumerate(write(vectors, asked.encoding_format))
                    ],
                    "usage": {"prompt_tokens": used, "total_tokens": used},
                }
            )
        )

    return [Route("/v1/embeddings", door.guard(embed), methods=["POST"])]


def list_paths(versions: Sequence[Version]) -> Paths:
    names = [one.name for one in versions if one.spec.get("model", {}).get("kind") == "encoder"]
    examples = {name: {"model": name, "input": "Hello"} for name in names}
    post = operation(
        "A vector of unit length for each text",
        an_object(object=TEXT, model=TEXT, data=a_list(ANYTHING), usage=ANYTHING),
        name="embeddings",
        body={JSON_TYPE: json_body(Embedding.model_json_schema(), examples)},
    )
    return {"/v1/embeddings": {"post": post}}


def read_texts(served: Served, texts: tuple[str, ...]) -> list[NDArray[np.int32]]:
    """The token ids of each text, with the marks that the model expects.

    Raises:
        Refusal: 422, the model embeds no texts, or a text is empty or too long.
    """
    features = served.predictor.features
    if not isinstance(served.predictor.network, Encoder) or not isinstance(features, TextFeatures):
        message = f"{served.version.ref} is no encoder of texts: it has no embeddings"
        raise Refusal(422, message, "model")
    return [
        read_text(served.predictor.tokenizer, text, features.length, f"input[{i}]")
        for i, text in enumerate(texts)
    ]


def read_text(tokenizer: Any, text: str, length: int, field: str) -> NDArray[np.int32]:
    if not text.strip():
        raise Refusal(422, f"{field} must not be empty", field)
    if len(text) > length * LONGEST_TOKEN:
        message = f"{field} has {len(text):,} characters, the model reads {length:,} tokens"
        raise Refusal(422, message, field)
    tokens = tokenizer.encode(text).ids
    if len(tokens) > length:
        message = f"{field} has {len(tokens):,} tokens, the model reads {length:,}"
        raise Refusal(422, message, field)
    return np.array(tokens, np.int32)


def write(vectors_ND: NDArray[np.float32], encoding: str) -> list[Any]:
    unit_ND = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True).clip(1e-12)
    if encoding == "float":
        return list(unit_ND.tolist())
    return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in unit_ND]
