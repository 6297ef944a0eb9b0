"""Every storage that operations make, from the operation that makes it until it is freed."""

import weakref
from collections.abc import Callable
from itertools import count
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Made = Callable[[int, int, Any, tuple[Any, ...]], None]
Freed = Callable[[int, int], None]


class Follower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls `made` and `freed` with a number for each storage and its bytes, `made` also with the
    operation and what that was given.

    What was there before, as the weights that a view shows again, is not made. An address serves
    one storage after another, a number does not.
    """

    def __init__(self, made: Made, freed: Freed) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made, self._freed = made, freed
        self._numbers: dict[int, int] = {}
        self._serial = count()

    def number_of(self, tensor: Tensor) -> int | None:
        """That of the storage of `tensor`, None if it was not made within."""
        return self._numbers.get(key_of(tensor))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {key_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        results = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if (
                isinstance(leaf, Tensor)
                and (key := key_of(leaf)) not in given | self._numbers.keys()
            ):
                size = _local(leaf).untyped_storage().nbytes()
                self._numbers[key] = number = next(self._serial)
                self._made(number, size, func, args)
                weakref.finalize(_local(leaf).untyped_storage(), self._free, key, size)
        return results

    def _free(self, key: int, size: int) -> None:
        self._freed(self._numbers.pop(key), size)


def key_of(tensor: Tensor) -> int:
    """What tells its storage from all others that are there."""
    key: int = _local(tensor).untyped_storage()._cdata
    return key


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
