"""Tensors in host memory as files of the safetensors format, each tensor with a hash of its own."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from heliostat.errors import HeliostatError
from heliostat.train.span import Span, hash_bytes

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}


def name_type(name: str, dtype: torch.dtype) -> str:
    """The name that safetensors has for `dtype`.

    Raises:
        HeliostatError: it has none.
    """
    if dtype not in _NAMES:
        raise HeliostatError(f"{name} is of {dtype}, which a checkpoint cannot hold")
    return _NAMES[dtype]


def find_type(name: str) -> torch.dtype:
    return _TYPES[name]


def split_files(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """The keys of `sizes` in order, in groups of at most `most` bytes or of one key."""
    group: list[str] = []
    for key, size in sizes.items():
        if group and sum(sizes[other] for other in group) + size > most:
            yield group
            group = []
        group.append(key)
    if group:
        yield group


def encode(tensors: Mapping[str, Tensor]) -> tuple[bytes, Span, dict[str, Span]]:
    """A safetensors file of contiguous host tensors; where its header and each tensor lie in it."""
    views = {name: _view(tensor) for name, tensor in tensors.items()}
    stops = list(itertools.accumulate(len(view) for view in views.values()))
    offsets = {
        name: [stop - len(views[name]), stop] for name, stop in zip(views, stops, strict=True)
    }
    text = json.dumps(
        {
            name: {
                "dtype": name_type(name, tensor.dtype),
                "shape": list(tensor.shape),
                "data_offsets": offsets[name],
            }
            for name, tensor in tensors.items()
        }
    ).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    spans = {
        name: Span(len(header) + offsets[name][0], len(view), hash_bytes(view))
        for name, view in views.items()
    }
    head = Span(0, len(header), hash_bytes(header))
    return b"".join([header, *views.values()]), head, spans


def decode(data: memoryview, dtype: str, shape: Sequence[int]) -> Tensor:
    """The tensor of this shape whose bytes are `data`, which must be writable memory."""
    return torch.frombuffer(data, dtype=_TYPES[dtype]).reshape(tuple(shape))


def _view(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
