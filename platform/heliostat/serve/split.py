"""Of a model with a candidate: which requests it gets, and how what it answers compares."""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from heliostat.serve.table import Candidate

MODEL_PATH = re.compile(r"/v[12]/models/([^/:]+)(?::\w+|/\w+)")
NAMED_IN_BODY = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/embeddings"})
IGNORED = frozenset({"version", "model_version", "id", "created"})
WHOLE = 2**64


def find_model(path: str, body: bytes) -> str | None:
    """The model that a request is about, if it leaves the version open."""
    if match := MODEL_PATH.fullmatch(path):
        return match[1]
    if path not in NAMED_IN_BODY:
        return None
    try:
        document = from_json(body)
    except ValueError:
        return None
    name = document.get("model") if isinstance(document, dict) else None
    return name if isinstance(name, str) else None


def is_chosen(candidate: Candidate, name: str, tag: str) -> bool:
    """Whether the request with `tag` is in the candidate's share.

    The tag is drawn for every request, or of a key the same each time. A share that grows keeps
    who was in it; another version has another share.
    """
    text = f"{name}:{candidate.number}:{tag}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8]) < candidate.terms.share * WHOLE


@dataclass(frozen=True)
class Answer:
    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    @property
    def is_stream(self) -> bool:
        """Whether it came in pieces, of which each has its own id."""
        return dict(self.headers).get(b"content-type", b"").startswith(b"text/event-stream")


def difference(one: Answer, other: Answer) -> float:
    """The largest difference of two numbers at one place of two answers; infinite of anything else.

    Ids, times and version numbers are not compared.
    """
    if one.status != other.status:
        return math.inf
    try:
        return _difference(from_json(one.body), from_json(other.body))
    except ValueError:
        return 0.0 if one.body == other.body else math.inf


def _difference(one: Any, other: Any) -> float:
    if isinstance(one, bool) or isinstance(other, bool):
        return 0.0 if one is other else math.inf
    match one, other:
        case ((int() | float()), (int() | float())):
            return abs(one - other)
        case list(), list() if len(one) == len(other):
            return max(map(_difference, one, other), default=0.0)
        case Mapping(), Mapping() if one.keys() == other.keys():
            names = one.keys() - IGNORED
            return max((_difference(one[name], other[name]) for name in names), default=0.0)
    return 0.0 if one == other else math.inf
