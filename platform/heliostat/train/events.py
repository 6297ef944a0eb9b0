"""TensorBoard event files in the bucket beside their run, written anew at every checkpoint."""

import secrets
import struct
import time
from collections.abc import Callable, Sequence

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from heliostat.errors import HeliostatError
from heliostat.metrics import Sample
from heliostat.storage import Store

MAX_FILE_BYTES = 2**20
VERSION = "brain.Event:2"


class EventFiles:
    """A sink of `metrics.emit`; what it was given reaches the bucket with `upload`.

    Objects cannot be appended to, so a file is uploaded whole until it has `max_bytes`, then the
    next one begins. No two attempts write the same file, and the first event of an attempt tells
    TensorBoard to forget what an earlier one showed after the step that this one resumes from.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        first_step: int = 0,
        unix_time: Callable[[], float] = time.time,
        max_bytes: int = MAX_FILE_BYTES,
    ):
        self._store, self._unix_time, self._max_bytes = store, unix_time, max_bytes
        # TensorBoard reads the files in the order of their names.
        stem = f"events.out.tfevents.{unix_time():017.6f}.{secrets.token_hex(4)}"
        self._stem = f"runs/{run}/tensorboard/{stem}"
        self._files = 0
        self._unsent = True
        self._data = self._begin()
        self._add(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def __call__(self, step: int, samples: Sequence[Sample]) -> None:
        values = [Summary.Value(tag=sample.key, simple_value=sample.value) for sample in samples]
        self._add(Event(step=step, summary=Summary(value=values)))

    def upload(self) -> None:
        """Put what came since the last upload into the bucket.

        Raises:
            HeliostatError: the bucket cannot be written; the next upload has it all.
        """
        if taken := self.take():
            try:
                self._store.write(*taken)
            except HeliostatError:
                self._unsent = True
                raise

    def take(self) -> tuple[str, bytes] | None:
        """What `upload` would write, for the caller to write: a key and bytes, None if nothing."""
        if not self._unsent:
            return None
        self._unsent = False
        return f"{self._stem}.{self._files:06d}", bytes(self._data)

    def _begin(self) -> bytearray:
        return bytearray(_frame(Event(wall_time=self._unix_time(), file_version=VERSION)))

    def _add(self, event: Event) -> None:
        if not self._unsent and len(self._data) >= self._max_bytes:
            self._files += 1
            self._data = self._begin()
        event.wall_time = self._unix_time()
        self._data += _frame(event)
        self._unsent = True


def _frame(event: Event) -> bytes:
    """An event as a record of a TFRecord file: its length and its bytes, each with a checksum."""
    data: bytes = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))
