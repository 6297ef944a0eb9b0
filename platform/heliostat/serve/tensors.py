"""Tensors of the Open Inference Protocol on the wire: as JSON, or as bytes behind a JSON header."""

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, cast

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import AfterValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from heliostat.data.nested import NUMBERS_OR_NULL, WHOLE, read_numbers
from heliostat.serve.body import Part, check, parse_json
from heliostat.serve.replies import Refusal

HEADER_LENGTH = "inference-header-content-length"
BYTES = "BYTES"
DTYPES: dict[str, np.dtype[Any]] = {
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
MAX_DIMENSIONS = 8
MAX_TENSORS = 4096
MAX_ID_CHARS = 256
MAX_KNOWN_BYTES = 4096
LENGTH = struct.Struct("<I")

Name = Annotated[str, Field(max_length=1024)]
Size = Annotated[int, Field(ge=0, le=2**31)]


def _refuse_memory(region: str | None) -> str | None:
    if region is not None:
        message = "shared memory is of one machine: send and take the data itself"
        raise PydanticCustomError("memory", message)
    return region


class TensorParameters(Part):
    """A client's own parameters mean nothing here."""

    model_config = ConfigDict(extra="ignore")

    shared_memory_region: Annotated[str | None, AfterValidator(_refuse_memory)] = None


class InputParameters(TensorParameters):
    binary_data_size: Annotated[int, Field(ge=0)] | None = None


class InputPart(Part):
    name: Name
    shape: Annotated[list[Size], Field(min_length=1, max_length=MAX_DIMENSIONS)]
    datatype: Literal[
        "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
        "FP16", "FP32", "FP64", "BYTES",
    ]  # fmt: skip
    parameters: InputParameters = InputParameters()
    data: Any = None


class OutputParameters(TensorParameters):
    binary_data: bool | None = None
    classification: Annotated[int, Field(ge=1)] | None = None


class OutputPart(Part):
    name: Name
    parameters: OutputParameters = OutputParameters()


def _refuse_state(sequence: int | str) -> int | str:
    if sequence:
        message = "models here keep no state from request to request: it must be 0, or left out"
        raise PydanticCustomError("state", message)
    return sequence


def _refuse_rank(priority: int) -> int:
    if priority:
        message = "all requests wait in one queue: it must be 0, or left out"
        raise PydanticCustomError("rank", message)
    return priority


class RequestParameters(Part):
    """What is asked of a request as a whole; a client's own parameters mean nothing here.

    `timeout` is in microseconds, 0 is none.
    """

    model_config = ConfigDict(extra="ignore")

    binary_data_output: bool = False
    timeout: Annotated[int, Field(ge=0, lt=2**64)] = 0
    priority: Annotated[int, AfterValidator(_refuse_rank)] = 0
    sequence_id: Annotated[int | str, AfterValidator(_refuse_state)] = 0

    @property
    def seconds(self) -> float:
        return self.timeout / 1e6 or math.inf


class Question(Part):
    """The JSON of a request; without `outputs` all of them are wanted."""

    id: Annotated[str, Field(max_length=MAX_ID_CHARS)] | None = None
    parameters: RequestParameters = RequestParameters()
    inputs: Annotated[list[InputPart], Field(min_length=1, max_length=MAX_TENSORS)]
    outputs: Annotated[list[OutputPart], Field(min_length=1, max_length=MAX_TENSORS)] | None = None


@dataclass(frozen=True)
class Tensor:
    """A tensor of a request: numbers, or of BYTES objects (str, and None where JSON has null).

    `path` is where it stands in the request.
    """

    name: str
    datatype: str
    values: NDArray[Any]
    path: str

    def refuse(self, key: str, problem: str) -> Refusal:
        """The refusal of a value of this tensor, `key` is the part of it that is wrong."""
        field = f"{self.path}.{key}"
        return Refusal(422, f"{field} of {self.name!r:.80} {problem}", field)


@dataclass(frozen=True)
class Answer:
    """A tensor of an answer; the values of BYTES are texts."""

    name: str
    datatype: str
    values: NDArray[Any]


def parse_question(body: bytes, header_length: str | None) -> tuple[Question, list[Tensor]]:
    """The request and its tensors; numbers that were sent as bytes are a view of `body`.

    `header_length` says how long the JSON is, None if it is all there is.

    Raises:
        Refusal: 400 not JSON, or no such header; 422 a field that does not fit, by its path.
    """
    length = len(body) if header_length is None else _parse_length(header_length, len(body))
    head = memoryview(body)[:length]
    is_short = header_length is not None and length <= MAX_KNOWN_BYTES
    question = _read_known(bytes(head)) if is_short else _read_question(head)
    tensors, names, place = [], set[str](), length
    for index, part in enumerate(question.inputs):
        path = f"inputs[{index}]"
        if part.name in names:
            raise Refusal(422, f"{path}.name {part.name!r:.80} is given twice", f"{path}.name")
        names.add(part.name)
        size = part.parameters.binary_data_size
        values = _read_json(part, path) if size is None else _read_bytes(part, path, body, place)
        tensors.append(Tensor(part.name, part.datatype, values, path))
        place += size or 0
    if place != len(body):
        raise Refusal(422, f"{len(body) - place:,} bytes of the body belong to no input", "body")
    return question, tensors


def are_numbers(body: bytes, header_length: str | None) -> bool:
    """Whether all tensors are numbers as bytes, of which none is read, behind little JSON."""
    if header_length is None:
        return False
    length = _parse_length(header_length, len(body))
    return length <= MAX_KNOWN_BYTES and all(
        part.datatype != BYTES and part.data is None for part in _read_known(body[:length]).inputs
    )


def render_answer(
    document: dict[str, Any], answers: Sequence[tuple[Answer, bool]]
) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON if tensors follow it as bytes.

    Each tensor comes with whether it is wanted as bytes.
    """
    outputs, raw = [], list[bytes]()
    for answer, is_binary in answers:
        output: dict[str, Any] = {
            "name": answer.name,
            "datatype": answer.datatype,
            "shape": answer.values.shape,
        }
        if is_binary:
            raw.append(_to_bytes(answer))
            output["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            output["data"] = _to_json(answer)
        outputs.append(output)
    content = orjson.dumps(document | {"outputs": outputs}, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"".join([content, *raw]), len(content) if raw else None


def _read_question(head: bytes | memoryview) -> Question:
    return check(Question, parse_json(head))


# Who sends tensors as bytes sends the same JSON before them every time.
_read_known = lru_cache(256)(_read_question)


def _parse_length(text: str, most: int) -> int:
    if text.isascii() and text.isdigit() and len(text) < 16 and int(text) <= most:
        return int(text)
    raise Refusal(
        400,
        f"{HEADER_LENGTH} must be how many of the body's {most:,} bytes are JSON",
        HEADER_LENGTH,
    )


def _read_bytes(part: InputPart, path: str, body: bytes, place: int) -> NDArray[Any]:
    field = f"{path}.parameters.binary_data_size"
    size, count = cast(int, part.parameters.binary_data_size), math.prod(part.shape)
    if part.data is not None:
        raise Refusal(422, f"{path} has both data and binary_data_size: send one", f"{path}.data")
    if size > len(body) - place:
        raise Refusal(422, f"{field} is {size:,}, but {len(body) - place:,} bytes follow", field)
    if part.datatype == BYTES:
        texts = list(_split_texts(memoryview(body)[place : place + size], f"{path}.data"))
        if len(texts) != count:
            raise Refusal(422, f"{path}.shape is {part.shape}, but {len(texts):,} follow", field)
        return _to_objects(texts).reshape(part.shape)
    dtype = DTYPES[part.datatype]
    if size != count * dtype.itemsize:
        needed = f"{count * dtype.itemsize:,} bytes for {part.shape} of {part.datatype}"
        raise Refusal(422, f"{field} is {size:,}, it must be {needed}", field)
    return np.frombuffer(body, dtype, count, place).reshape(part.shape)


def _split_texts(data: memoryview, path: str) -> Iterator[str]:
    """Each text stands behind its length in bytes."""
    place = 0
    while place < len(data):
        start = place + LENGTH.size
        if start > len(data):
            raise Refusal(422, f"{path} ends in the length of an element", path)
        (length,) = LENGTH.unpack_from(data, place)
        place = start + length
        if place > len(data):
            raise Refusal(422, f"{path} ends {place - len(data):,} bytes early", path)
        try:
            yield str(data[start:place], "utf-8")
        except UnicodeDecodeError as error:
            raise Refusal(422, f"{path} has an element that is not UTF-8 text", path) from error


def _read_json(part: InputPart, path: str) -> NDArray[Any]:
    field, count = f"{path}.data", math.prod(part.shape)
    if not isinstance(part.data, list):
        raise Refusal(422, f"{field} must be a list of {count:,} values", field)
    values = _read_texts(part, field) if part.datatype == BYTES else _read_typed(part, field)
    if values.size != count or (values.ndim > 1 and list(values.shape) != part.shape):
        raise Refusal(
            422, f"{field} has the shape {list(values.shape)} instead of {part.shape}", field
        )
    return values.reshape(part.shape)


def _read_typed(part: InputPart, field: str) -> NDArray[Any]:
    """JSON numbers in the type that was declared; null is NaN, which only floats have."""
    dtype = DTYPES[part.datatype]
    kinds = NUMBERS_OR_NULL if dtype.kind == "f" else WHOLE
    with np.errstate(over="ignore"):
        values = read_numbers(part.data, kinds, dtype)
    if values is None or (dtype.kind == "f" and np.isinf(values).any()):
        raise Refusal(422, f"{field} must be numbers of {part.datatype}, in equal lists", field)
    return values


def _read_texts(part: InputPart, field: str) -> NDArray[Any]:
    flat = list(_flatten(part.data, MAX_DIMENSIONS))
    for index, text in enumerate(flat):
        if text is not None and not isinstance(text, str):
            raise Refusal(422, f"{field}[{index}] must be a string", f"{field}[{index}]")
    return _to_objects(flat)


def _flatten(values: list[Any], depth: int) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list) and depth > 1:
            yield from _flatten(value, depth - 1)
        else:
            yield value


def _to_objects(values: list[Any]) -> NDArray[Any]:
    objects = np.empty(len(values), object)
    objects[:] = values
    return objects


def _to_bytes(answer: Answer) -> bytes:
    if answer.datatype != BYTES:
        return answer.values.astype(DTYPES[answer.datatype], copy=False).tobytes()
    texts = [text.encode() for text in answer.values.ravel().tolist()]
    return b"".join(part for text in texts for part in (LENGTH.pack(len(text)), text))


def _to_json(answer: Answer) -> Any:
    flat = answer.values.ravel()
    return flat.tolist() if answer.datatype == BYTES else np.ascontiguousarray(flat)
