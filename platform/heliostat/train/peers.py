"""The ranks of a run deciding together: what one finds wrong, all find wrong."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import distributed

from heliostat.errors import HeliostatError

T = TypeVar("T")


@dataclass(frozen=True)
class Peers:
    """All ranks of a process group on CPUs, or one process alone where `group` is None."""

    group: distributed.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        return distributed.get_rank(self.group) if self.group else 0

    @property
    def size(self) -> int:
        return distributed.get_world_size(self.group) if self.group else 1

    def all(self, act: Callable[[], T]) -> list[T]:
        """What `act` returns on each rank; every rank must call this.

        Raises:
            Exception: what `act` raised on the lowest rank that failed; on every rank.
        """
        own: Exception | None = None
        value: T | None = None
        try:
            value = act()
        except Exception as error:  # raised again below, once the others know
            own = error
        outcomes: list[Any] = [(value, _portable(own))]
        if self.group:
            outcomes = [None] * self.size
            distributed.all_gather_object(outcomes, (value, _portable(own)), group=self.group)
        for rank, (_, failure) in enumerate(outcomes):
            if failure:
                raise own if own and rank == self.rank else failure
        return [cast(T, value) for value, _ in outcomes]

    def first(self, act: Callable[[], T]) -> T:
        """What `act` returns on rank 0, on every rank; it runs nowhere else."""
        return cast(T, self.all(lambda: act() if self.rank == 0 else None)[0])


def open_peers() -> Peers:
    """The ranks of the default process group, in a group of their own that a thread may use.

    Every rank must call this, at the same point.
    """
    if not distributed.is_initialized():
        return Peers()
    return Peers(distributed.new_group(backend="gloo"))


def _portable(error: Exception | None) -> Exception | None:
    """An error that can be pickled; that of another rank is told by its text."""
    if error is None or isinstance(error, HeliostatError):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
