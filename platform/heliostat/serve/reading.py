"""Where a body is read: in the event loop what takes it no time, all else in threads beside it."""

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from heliostat.data.features import Features, ImageFeatures, TextFeatures
from heliostat.serve.shelf import SWITCH_SECONDS

# About a millisecond each, several times of what a thread costs.
SHORT_BYTES = 16_384
SHORT_TEXT_BYTES = 4_096  # which a tokenizer reads
SHORT_TENSOR_BYTES = 2_097_152  # of numbers that are sent as bytes

# An image of the most pixels takes some hundred MB while it is decoded: so many at once, others
# wait, and those whose client leaves meanwhile are not decoded.
THREADS = 2
READ_POOL = ThreadPoolExecutor(
    THREADS, "read", initializer=partial(sys.setswitchinterval, SWITCH_SECONDS)
)

T = TypeVar("T")


async def read(work: Callable[[], T], is_short: bool) -> T:
    """What `work` returns, which holds up no other request unless it is short."""
    if is_short:
        return work()
    return await asyncio.get_running_loop().run_in_executor(READ_POOL, work)


def is_short(features: Features, body: bytes) -> bool:
    """Whether no more than a file of an image can make it long to read `body`."""
    is_text = isinstance(features, TextFeatures)
    return len(body) <= (SHORT_TEXT_BYTES if is_text else SHORT_BYTES)


def may_have_files(features: Features, body: bytes) -> bool:
    """Whether an image in `body` may be a file: it is one itself, or has objects in its object."""
    if not isinstance(features, ImageFeatures):
        return False
    return not body.lstrip().startswith(b"{") or body.count(b"{") > 1
