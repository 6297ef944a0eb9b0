"""Small requests that a model can answer, made of what its version says of the data."""

import base64
import io
import math
from typing import Any

import numpy as np
from PIL import Image

from heliostat.data.features import (
    Features,
    ImageFeatures,
    NumericColumn,
    SeriesFeatures,
    TableFeatures,
    TextFeatures,
)
from heliostat.data.pixels import MODES
from heliostat.serve.inputs import list_inputs
from heliostat.serve.tensors import BYTES

MAX_VALUES = 4096  # of a tensor in a document that people read
WORDS = "An example."


def make_instance(features: Features) -> Any:
    """An instance for `:predict` and `:explain`; None of a language model."""
    match features:
        case ImageFeatures(height, width, channels):
            return {"b64": _draw(height, width, channels)}
        case TextFeatures():
            return WORDS
        case SeriesFeatures(mean=mean):
            return [list(mean)]
        case TableFeatures(columns):
            return {
                column.name: column.mean
                if isinstance(column, NumericColumn)
                else next(iter(column.values), None)
                for column in columns
            }
    return None


def make_question(features: Features) -> dict[str, Any] | None:
    """The same as tensors in JSON; None of a language model, or of images too large to read."""
    inputs = []
    for slot in list_inputs(features):
        shape = [max(1, size) for size in slot.shape]
        if math.prod(shape) > MAX_VALUES:
            return None
        value: object = WORDS if slot.datatype == BYTES else 0
        data = [value] * math.prod(shape)
        inputs.append({"name": slot.name, "datatype": slot.datatype, "shape": shape, "data": data})
    return {"inputs": inputs} if inputs else None


def _draw(height: int, width: int, channels: int) -> str:
    """A black PNG in base64."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).convert(MODES[channels]).save(
        file, "PNG"
    )
    return base64.b64encode(file.getvalue()).decode()
