"""A store behind a bad network: what is read for the first time comes with one bit wrong."""

from dataclasses import dataclass, field

from heliostat.storage import LocalStore


@dataclass(frozen=True)
class GarblingStore(LocalStore):
    seen: set[tuple[str, int]] = field(default_factory=set, compare=False)

    def read_range(self, key: str, offset: int, length: int) -> bytearray:
        data = super().read_range(key, offset, length)
        if (key, offset) not in self.seen:
            self.seen.add((key, offset))
            data[-1] ^= 1
        return data


class ForgetfulStore(LocalStore):
    """As read by a machine whose memory loses a bit, each time."""

    def read_range(self, key: str, offset: int, length: int) -> bytearray:
        data = super().read_range(key, offset, length)
        data[-1] ^= 1
        return data
