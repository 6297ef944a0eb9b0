"""How often the workers of a run failed: not every restart is one."""

import json
from dataclasses import asdict, dataclass, replace

from heliostat.storage import Store


@dataclass(frozen=True)
class Tally:
    """Failures up to the last start, which was one of `workers` workers.

    `excused` is an end that was announced, as that of a node on the spot market.
    """

    failures: int = 0
    workers: int = 0
    excused: bool = False

    def start(self, workers: int) -> "Tally":
        """The tally at the next start. A group that grew was stopped in order to grow."""
        failed = 0 < workers <= self.workers and not self.excused
        return Tally(self.failures + failed, workers)


def count_start(store: Store, key: str, workers: int) -> Tally:
    """The tally at `key` with one more start of `workers` workers."""
    tally = read_tally(store, key).start(workers)
    _write(store, key, tally)
    return tally


def excuse(store: Store, key: str) -> None:
    """The end that comes now is no failure."""
    _write(store, key, replace(read_tally(store, key), excused=True))


def read_tally(store: Store, key: str) -> Tally:
    return Tally(**json.loads(store.read(key))) if store.stat(key) else Tally()


def _write(store: Store, key: str, tally: Tally) -> None:
    store.write(key, json.dumps(asdict(tally)).encode())
