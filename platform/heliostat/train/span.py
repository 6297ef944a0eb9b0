"""A run of bytes in a file and their hash: what a checkpoint says of all that it holds."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Bytes of a file."""

    offset: int
    size: int
    sha256: str


def hash_bytes(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
