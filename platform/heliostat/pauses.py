"""How long a kind of machine that the cloud did not have is not asked for again."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

FIRST_SECONDS, MOST_SECONDS = 5.0, 60.0


@dataclass(frozen=True)
class _Pause:
    refusal: Exception
    seconds: float
    end: float


class Pauses:
    """One for each node type that was refused, each twice as long as the one before.

    Ray's autoscaler asks again every few seconds, for as long as somebody waits for such a node.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._pauses: dict[str, _Pause] = {}

    @contextlib.contextmanager
    def keep(self, node_type: str) -> Iterator[None]:
        """Around what asks the cloud for nodes of this type.

        Raises:
            Exception: what was raised there the last time, without asking, in a pause.
        """
        pause = self._pauses.get(node_type)
        if pause and self._monotonic() < pause.end:
            raise pause.refusal.with_traceback(None)
        try:
            yield
        except Exception as error:
            seconds = min(2 * pause.seconds, MOST_SECONDS) if pause else FIRST_SECONDS
            self._pauses[node_type] = _Pause(error, seconds, self._monotonic() + seconds)
            raise
        self._pauses.pop(node_type, None)
