"""A file read by ranges: what Parquet's reader needs of an object that is not read whole."""

import io
from collections.abc import Callable
from typing import Any


class RangedFile(io.IOBase):
    """A file of `size` bytes; `fetch(offset, count)` returns exactly those bytes of it.

    PyArrow reads from what `fetch` returns, without a copy.
    """

    def __init__(self, size: int, fetch: Callable[[int, int], bytearray | memoryview]) -> None:
        self._size, self._fetch, self._position = size, fetch, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int = -1) -> Any:
        rest = max(0, self._size - self._position)
        count = rest if size < 0 else min(size, rest)
        data = self._fetch(self._position, count)
        self._position += count
        return data
