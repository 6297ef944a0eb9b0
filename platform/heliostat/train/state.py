"""The tensors that a resumed run needs, by names that no wrapper and no world size changes.

Only tensors are here: what an optimiser is set to comes from the spec, so that a resumption with
another learning rate has that rate, and random numbers are keyed by step and sample.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from heliostat.errors import HeliostatError

MODEL, AVERAGE, OPTIMIZER = "model/", "average/", "optimizer/"

# What torch.compile and activation checkpointing put into the names of what they wrap.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class State:
    """What is trained; `average` holds the moving averages of the weights by parameter name."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: Mapping[str, Tensor] = field(default_factory=dict)


def name_tensors(state: State) -> dict[str, Tensor]:
    """The live tensors as model/NAME, average/PARAMETER and optimizer/PARAMETER/SLOT.

    Writing into them changes the state; under FSDP2 they are DTensors.

    Raises:
        HeliostatError: the model keeps something in its state that is not a tensor.
    """
    return {**_name_weights(state), **_name_slots(state)}


def make_targets(state: State, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors to fill with a checkpoint of these shapes, to be given to `install` then.

    Those of the model are its own. Those of the optimiser are new, because a fresh one has none:
    sharded like the parameter if they have its shape.
    """
    targets = _name_weights(state)
    parameters = dict(_name_parameters(state.model))
    for name, shape in shapes.items():
        parameter = parameters.get(_split_slot(name)[0]) if name.startswith(OPTIMIZER) else None
        if parameter is not None:
            alike = parameter.shape == shape
            targets[name] = torch.zeros_like(parameter.data) if alike else torch.zeros(shape)
    return targets


def install(state: State, targets: Mapping[str, Tensor]) -> None:
    """Give the optimiser the slots among `targets`, in place of those it has."""
    slots: dict[str, dict[str, Tensor]] = {}
    for key in targets:
        if key.startswith(OPTIMIZER):
            parameter, slot = _split_slot(key)
            slots.setdefault(parameter, {})[slot] = targets[key]
    names = {parameter: name for name, parameter in _name_parameters(state.model)}
    groups = state.optimizer.param_groups
    order = [names[parameter] for group in groups for parameter in group["params"]]
    state.optimizer.load_state_dict(
        {
            "state": {index: slots[name] for index, name in enumerate(order) if name in slots},
            "param_groups": state.optimizer.state_dict()["param_groups"],
        }
    )


def take_local(tensor: Tensor) -> Tensor:
    """The part of `tensor` that lies on this rank."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _name_weights(state: State) -> dict[str, Tensor]:
    weights = {MODEL + _clean(name): value for name, value in _unwrap(state.model).items()}
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise HeliostatError(
                f"{name} in the state of the model is {type(value).__name__}, not a tensor: keep "
                "it outside of state_dict"
            )
    return weights | {AVERAGE + _clean(name): value for name, value in state.average.items()}


def _name_slots(state: State) -> dict[str, Tensor]:
    slots = state.optimizer.state
    return {
        f"{OPTIMIZER}{name}/{slot}": value
        for name, parameter in _name_parameters(state.model)
        for slot, value in slots.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def _name_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((_clean(name), value) for name, value in _find_network(model).named_parameters())


def _split_slot(key: str) -> tuple[str, str]:
    parameter, _, slot = key.removeprefix(OPTIMIZER).rpartition("/")
    return parameter, slot


def _unwrap(model: nn.Module) -> dict[str, Tensor]:
    return _find_network(model).state_dict()


def _find_network(model: nn.Module) -> nn.Module:
    """The network within data parallel and the compiler."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        inner = getattr(inner, "_orig_mod", inner)
        if inner is model:
            return model
        model = inner


def _clean(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
