"""Why a model answers as it does: attributions of one row's inputs, by Captum.

Captum is imported when it is asked: it brings matplotlib, for which a replica would start later.

What is explained is the score of a class, its logit, or a predicted number as it stands in the
data. Integrated gradients (Sundararajan et al. 2017) spread f(x) - f(baseline) over the inputs
exactly, up to the error of an integral; `gap` is what is left of it.
"""

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from heliostat.data.encoding import Arrays, encode
from heliostat.data.features import (
    COLUMN_PREFIX,
    NUMBERS,
    TEXT,
    Columns,
    Features,
    ImageFeatures,
    NumericColumn,
    SeriesFeatures,
    TableFeatures,
    TextFeatures,
)
from heliostat.data.tokens import Token, locate_tokens
from heliostat.errors import HeliostatError
from heliostat.evaluate import Predictor
from heliostat.signature import Classes, Numbers, Output

Method = Literal["integrated_gradients", "occlusion"]
Array = NDArray[Any]

MIN_STEPS, MAX_STEPS, GROWTH = 8, 512, 4
GAUSS_STEPS = 32  # the places of 512 Gaussian steps cost more than their gradients
SQUARES_PER_SIDE = 7
MAX_LISTED = 20
BATCH_ROWS = 64
ENOUGH = 1e-3  # of |f(x) - f(baseline)|: more steps would change no figure that is shown
BASELINES = {
    ImageFeatures: "the mean pixel of the training split",
    SeriesFeatures: "the mean of each channel over the training split",
    TableFeatures: "the mean of each number over the training split, no known category or id",
    TextFeatures: "token 0 in the place of each token of the text",
}

# Captum warns whenever there are several layers; those of a row's ids are side by side.
warnings.filterwarnings("ignore", "Multiple layers provided")


@dataclass(frozen=True)
class Explanation:
    """Attributions of one row.

    Of an image they are (height, width), of a series (steps, channels), of a table by column, of a
    text a list of {"token", "start", "end", "attribution"} with the place of each in the text.
    `steps` are points of the integral, or windows that were covered.
    """

    target: str
    score: float
    baseline_score: float
    gap: float
    method: Method
    steps: int
    baseline: str
    attributions: Any


class Scored(nn.Module):
    """A network whose outputs are a score for each name of `output`: (N, names)."""

    def __init__(self, network: nn.Module, output: Output) -> None:
        super().__init__()
        self.network, self.output = network, output
        self.numbers = nn.Identity()  # a layer to attribute to, where ids stand beside numbers

    def forward(self, *inputs: Tensor) -> Tensor:
        if inputs[-1].is_floating_point():
            inputs = (*inputs[:-1], self.numbers(inputs[-1]))
        outputs: Tensor = self.network(*inputs)
        if isinstance(self.output, Numbers):
            return outputs * torch.tensor(self.output.std) + torch.tensor(self.output.mean)
        return torch.cat([-outputs, outputs], dim=1) if outputs.shape[1] == 1 else outputs


@dataclass(frozen=True)
class Probe:
    """A network, what of its inputs is varied and from where, and what stays (`fixed`).

    With `layers` the outputs of these are varied instead, as numbers of whole ids cannot be.
    """

    network: Scored
    inputs: tuple[Tensor, ...]
    baselines: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...] = ()
    layers: tuple[nn.Module, ...] = ()

    def score(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Of each name, of one row: (names,)."""
        with torch.no_grad():
            scores: Tensor = self.network(*inputs, *self.fixed)[0]
        return scores.double()

    def integrate(self, target: int, steps: int) -> list[Array]:
        """The attributions of each input, or of each layer, of one row, without its first axis."""
        from captum.attr import IntegratedGradients, LayerIntegratedGradients

        options = {
            "baselines": self.baselines,
            "target": target,
            "additional_forward_args": self.fixed or None,
            "n_steps": steps,
            "method": "gausslegendre" if steps <= GAUSS_STEPS else "riemann_middle",
            "internal_batch_size": BATCH_ROWS,
        }
        if self.layers:
            integral: Any = LayerIntegratedGradients(self.network, list(self.layers))
        else:
            integral = IntegratedGradients(self.network)
        return [_to_array(found) for found in integral.attribute(self.inputs, **options)]

    def cover(self, target: int, patches: Array) -> Array:
        """What covering each patch of the first input takes from the score, spread over it."""
        from captum.attr import FeatureAblation

        mask = torch.from_numpy(patches).expand(self.inputs[0].shape)
        found = FeatureAblation(self.network).attribute(
            self.inputs[0],
            baselines=self.baselines[0],
            target=target,
            feature_mask=mask,
            perturbations_per_eval=BATCH_ROWS,
        )
        return _to_array(found) / np.bincount(mask.flatten().numpy())[patches]


def explain(
    predictor: Predictor,
    row: Columns,
    target: str | None = None,
    method: Method = "integrated_gradients",
    window: int | None = None,
    seconds_left: Callable[[], float] = lambda: math.inf,
) -> Explanation:
    """Attributions for one row, columns as `predict` takes them; without `target` of what it says.

    As many steps are taken as `seconds_left` allows, MIN_STEPS at least. Occlusion covers squares
    of `window` pixels of an image, larger ones if there is no time for so many.

    Raises:
        HeliostatError: the target is none of the names, the row makes the model overflow, or the
            method or the network does not suit.
    """
    probe, tokens = _prepare(predictor, row)
    names = _list_names(predictor.output)
    scores, baseline = probe.score(probe.inputs), probe.score(probe.baselines)
    if not (scores.isfinite().all() and baseline.isfinite().all()):
        raise HeliostatError("the row is too far outside the range of the training data")
    place = _find_target(names, target, scores, predictor.output)
    difference = float(scores[place] - baseline[place])
    if method == "occlusion":
        found, steps = _occlude(probe, predictor.features, place, window, seconds_left)
    else:
        found, steps = _integrate(probe, place, difference, seconds_left)
    return Explanation(
        names[place],
        float(scores[place]),
        float(baseline[place]),
        float(sum(part.sum() for part in found) - difference),
        method,
        steps,
        BASELINES[type(predictor.features)],
        _render(predictor.features, found, tokens),
    )


def plan_steps(
    steps: int, seconds: float, gap: float, difference: float, left: float
) -> int | None:
    """The number of steps to try after `steps` that took `seconds`; None if these have to do."""
    more = GROWTH * steps
    is_enough = abs(gap) <= ENOUGH * max(abs(difference), ENOUGH)
    return None if is_enough or more > MAX_STEPS or GROWTH * seconds > left else more


def plan_window(height: int, width: int, window: int, batch_seconds: float, left: float) -> int:
    """The side of the squares that there is time to cover, `window` or a multiple by 2."""
    while window < max(height, width):
        squares = math.ceil(height / window) * math.ceil(width / window)
        if math.ceil(squares / BATCH_ROWS) * batch_seconds <= left:
            break
        window *= 2
    return window


def _integrate(
    probe: Probe, target: int, difference: float, seconds_left: Callable[[], float]
) -> tuple[list[Array], int]:
    planned: int | None = MIN_STEPS
    while planned:
        steps, before = planned, seconds_left()
        found = probe.integrate(target, steps)
        after = seconds_left()
        gap = float(sum(part.sum() for part in found)) - difference
        seconds = before - after if math.isfinite(before) else 0.0
        planned = plan_steps(steps, seconds, gap, difference, after)
    return found, steps


def _occlude(
    probe: Probe,
    features: Features,
    target: int,
    window: int | None,
    seconds_left: Callable[[], float],
) -> tuple[list[Array], int]:
    if not isinstance(features, ImageFeatures):
        raise HeliostatError("occlusion is for images: use integrated_gradients")
    height, width = features.height, features.width
    before = seconds_left()
    probe.score(tuple(values.expand(BATCH_ROWS, *values.shape[1:]) for values in probe.inputs))
    left = seconds_left()
    seconds = before - left if math.isfinite(left) else 0.0
    wanted = window or max(1, min(height, width) // SQUARES_PER_SIDE)
    side = plan_window(height, width, wanted, seconds, left)
    across = math.ceil(width / side)
    rows, columns = np.arange(height) // side, np.arange(width) // side
    patches = rows[:, np.newaxis] * across + columns
    return [probe.cover(target, patches)], int(patches.max()) + 1


def _prepare(predictor: Predictor, row: Columns) -> tuple[Probe, list[Token]]:
    features, network = predictor.features, Scored(_borrow(predictor.network), predictor.output)
    match features:
        case ImageFeatures():
            (pixels,) = _to_tensors(encode(features, row))
            return Probe(network, (pixels,), (torch.zeros_like(pixels),)), []
        case SeriesFeatures():
            values, lengths = _to_tensors(encode(features, row))
            return Probe(network, (values,), (torch.zeros_like(values),), (lengths,)), []
        case TextFeatures():
            tokens = locate_tokens(predictor.tokenizer, row[TEXT][0], features.length)
            ids = torch.tensor([[token.id for token in tokens] or [0]])
            marks = torch.tensor([[token.is_mark for token in tokens] or [False]])
            embedding = _find_tokens(network, features.vocab)
            lengths = torch.tensor([ids.shape[1]])
            return Probe(network, (ids,), (ids * marks,), (lengths,), (embedding,)), tokens
        case TableFeatures():
            inputs = _to_tensors(encode(features, row))
            baselines = _to_tensors(encode(features, _average(features)))
            if not features.ids:
                return Probe(network, inputs, baselines), []
            sizes = tuple(len(column.values) + 1 for column in features.ids)
            layers = _find_ids(network, sizes)
            if features.slots.width:
                layers = (*layers, network.numbers)
            return Probe(network, inputs, baselines, (), layers), []
        case _:
            raise HeliostatError("a language model has no answer per row to explain")


def _average(features: TableFeatures) -> Columns:
    """A row with the mean of each number, and of the other columns what training never saw."""
    others = [column for column in features.columns if not isinstance(column, NumericColumn)]
    texts = {COLUMN_PREFIX + column.name: np.array([None], object) for column in others}
    return {NUMBERS: features.slots.mean[np.newaxis].copy(), **texts}


def _borrow(network: nn.Module) -> nn.Module:
    """The same weights in modules of their own: Captum hangs hooks on modules while it works."""
    weights = {
        id(weight): nn.Parameter(weight.detach(), requires_grad=False)
        for weight in network.parameters()
    }
    buffers = {id(buffer): buffer for buffer in network.buffers()}
    return copy.deepcopy(network, {**weights, **buffers})


def _find_tokens(network: nn.Module, vocab: int) -> nn.Module:
    """The embedding of tokens: the first one of that size.

    Raises:
        HeliostatError: a network of the user's own has none.
    """
    for module in network.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == vocab:
            return module
    raise HeliostatError(f"the network has no nn.Embedding of {vocab:,} tokens to attribute to")


def _find_ids(network: nn.Module, sizes: tuple[int, ...]) -> tuple[nn.Module, ...]:
    """The embeddings of id columns, in their order, once for every list of them that there is.

    Raises:
        HeliostatError: a network of the user's own has none.
    """
    lists = [tuple(module) for module in network.modules() if isinstance(module, nn.ModuleList)]
    found = [
        module
        for group in lists
        if tuple(getattr(module, "num_embeddings", 0) for module in group) == sizes
        for module in group
    ]
    if not found:
        raise HeliostatError(
            f"the network has no nn.ModuleList of nn.Embedding of the sizes {sizes} to attribute to"
        )
    return tuple(found)


def _list_names(output: Output) -> tuple[str, ...]:
    if isinstance(output, Classes):
        return output.labels
    return output.names if isinstance(output, Numbers) else ()


def _find_target(names: tuple[str, ...], target: str | None, scores: Tensor, output: Output) -> int:
    if target is None:
        return int(scores.argmax()) if isinstance(output, Classes) else 0
    if target not in names:
        listed = ", ".join(names[:MAX_LISTED]) + ", ..." * (len(names) > MAX_LISTED)
        raise HeliostatError(f"target {target!r:.80} is unknown, the targets are {listed}")
    return names.index(target)


def _render(features: Features, found: list[Array], tokens: list[Token]) -> Any:
    match features:
        case ImageFeatures():
            return found[0].sum(axis=0, dtype=np.float32)
        case SeriesFeatures():
            return np.ascontiguousarray(found[0], np.float32)
        case TextFeatures():
            weights = found[0].sum(axis=1)
            return [
                {
                    "token": token.name,
                    "start": token.start,
                    "end": token.end,
                    "attribution": float(weight),
                }
                for token, weight in zip(tokens, weights, strict=False)
            ]
        case TableFeatures():
            return _sum_columns(features, found)
    raise TypeError("such features have no attributions")


def _sum_columns(features: TableFeatures, found: list[Array]) -> dict[str, float]:
    """Of ids come the embeddings first, once or several times in the order of the columns."""
    owners = features.slots.owners
    sums = {column.name: 0.0 for column in features.columns}
    for column, part in zip(cycle(features.ids), found[: len(found) - bool(owners)], strict=False):
        sums[column.name] += float(part.sum())
    for name, value in zip(owners, found[-1].ravel() if owners else (), strict=True):
        sums[name] += float(value)
    return sums


def _to_tensors(arrays: Arrays) -> tuple[Tensor, ...]:
    return tuple(map(torch.from_numpy, arrays))


def _to_array(found: Any) -> Array:
    (tensor,) = found if isinstance(found, tuple) else (found,)
    return cast(Array, tensor.detach()[0].double().numpy())
