"""A network of the user's own, and its loss: functions in the job's working directory."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from heliostat.errors import HeliostatError
from heliostat.models.tasks import Task
from heliostat.signature import NextToken, Signature
from heliostat.spec import CustomSpec


def build_custom(spec: CustomSpec, signature: Signature, width: int) -> nn.Module:
    """What the function `spec.build` makes of the signature and `spec.options`.

    The network keeps its class's name and the names of its weights. It is trained like any other:
    with `heliostat.models.dropout.Dropout` its noise, too, belongs to the sample.

    Raises:
        HeliostatError: there is no such function, it does not take the options, or what it returns
            is no network; later, when the network runs: its outputs are not (N, width).
    """
    with _working_directory_on_path():
        function = _find(spec.build, "model.build")
        _check_options(function, spec, signature)
        network = function(signature, **spec.options)
    if not isinstance(network, nn.Module):
        raise HeliostatError(
            f"model.build={spec.build} returned a {type(network).__name__}: "
            "it must return a torch.nn.Module"
        )
    kind = type(network)
    checks = {"origin": spec.build, "token_wise": isinstance(signature.output, NextToken)}
    checked = type(kind.__name__, (_Checked, kind), {**checks, "outputs": width})
    network.__class__ = checked
    return network


def with_loss(spec: CustomSpec, task: Task) -> Task:
    """`task` with the loss of the function `spec.loss`, where there is one.

    The function takes the outputs, float32, and the targets, and returns the loss of each row,
    (N,): of a block of tokens the sum over its tokens.

    Raises:
        HeliostatError: there is no such function; later, when it runs: it returns another shape.
    """
    if spec.loss is None:
        return task
    with _working_directory_on_path():
        function = _find(spec.loss, "model.loss")

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = function(outputs.float(), targets)
        if not isinstance(losses, Tensor) or losses.shape != (len(outputs),):
            raise HeliostatError(
                f"model.loss={spec.loss} returned {_describe(losses)} for {len(outputs)} rows: it "
                f"must return the loss of each, a tensor of ({len(outputs)},); leave out its mean"
            )
        return losses.sum() * task.units

    return replace(task, loss=loss)


class _Checked(nn.Module):
    """In front of a user's class: looks at the outputs, and lends a row to a batch without."""

    origin: str
    outputs: int
    token_wise: bool

    def forward(self, *inputs: Tensor) -> Tensor:
        rows = len(inputs[0])
        outputs = super().forward(*(inputs if rows else map(_lend_row, inputs)))
        lead = inputs[0].shape if self.token_wise else inputs[0].shape[:1]
        expected = (max(rows, 1), *lead[1:], self.outputs)
        if not isinstance(outputs, Tensor) or outputs.shape != expected:
            raise HeliostatError(
                f"the network of model.build={self.origin} returned {_describe(outputs)}: "
                f"this data needs a tensor of {expected}"
            )
        return outputs[:rows]


def _lend_row(tensor: Tensor) -> Tensor:
    """One row of ones, as many layers refuse to run on none; what comes of it is cut off."""
    return tensor.new_ones([1, *(max(size, 1) for size in tensor.shape[1:])])


def _find(reference: str, key: str) -> Callable[..., Any]:
    """The function that `reference`, module:function, names; `key` is where it stands."""
    name, _, function = reference.partition(":")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise HeliostatError(
            f"{key}={reference} needs the module {name}, which is not in {os.getcwd()}: run from "
            "the directory that holds it (ray job submit --working-dir), also to evaluate or serve"
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        raise HeliostatError(f"{key}={reference}: the module {name} has no function {function}")
    return found  # type: ignore[no-any-return]


def _check_options(function: Callable[..., Any], spec: CustomSpec, signature: Signature) -> None:
    try:
        inspect.signature(function).bind(signature, **spec.options)
    except TypeError as error:
        raise HeliostatError(
            f"model.build={spec.build} is called with the signature of the data and model.options "
            f"{sorted(spec.options)}, but: {error}"
        ) from error


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {tuple(value.shape)}"
    return f"a {type(value).__name__}"


@contextmanager
def _working_directory_on_path() -> Iterator[None]:
    directory = os.getcwd()
    sys.path.append(directory)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(directory)
