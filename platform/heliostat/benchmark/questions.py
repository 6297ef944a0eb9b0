"""How each server is asked about an image, and where its answer has the probabilities."""

import json
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heliostat.benchmark.load import Request
from heliostat.benchmark.subjects import Subject

JSON_LENGTH = "inference-header-content-length"

Read = Callable[[bytes, Mapping[str, str]], NDArray[np.float64]]


@dataclass(frozen=True)
class Question:
    """A request, and what reads the probabilities (classes,) out of a body and its headers."""

    request: Request
    read: Read

    def ask(self) -> NDArray[np.float64]:
        request = urllib.request.Request(self.request.url, self.request.body, self.request.headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return self.read(response.read(), response.headers)


def ask_ours(base: str, subject: Subject, token: str) -> Question:
    return Question(_ask_json(f"{base}/v1/models/{subject.name}:predict", subject, token), _by_name)


def ask_fastapi(base: str, subject: Subject, token: str = "") -> Question:
    return Question(_ask_json(f"{base}/v1/models/{subject.name}:predict", subject, token), _by_row)


def ask_rows(base: str, subject: Subject) -> Question:
    return Question(_ask_json(f"{base}/predict", subject), _by_row)


def ask_binary(base: str, subject: Subject, token: str) -> Question:
    """By the binary extension of the Open Inference Protocol: one float32 a pixel, both ways."""
    pixels = subject.image.astype(np.float32)
    size = {"binary_data_size": pixels.nbytes}
    image = {"name": "image", "datatype": "FP32", "shape": pixels.shape, "parameters": size}
    wanted = {"name": "probabilities", "parameters": {"binary_data": True}}
    head = json.dumps({"inputs": [image], "outputs": [wanted]}).encode()
    headers = _headers(token) | {
        "content-type": "application/octet-stream",
        JSON_LENGTH: str(len(head)),
    }
    url = f"{base}/v2/models/{subject.name}/infer"
    return Question(Request(url, head + pixels.tobytes(), headers), _by_bytes)


def _ask_json(url: str, subject: Subject, token: str = "") -> Request:
    body = json.dumps({"instances": subject.instances}).encode()
    return Request(url, body, _headers(token) | {"content-type": "application/json"})


def _headers(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"} if token else {}


def _by_name(body: bytes, headers: Mapping[str, str]) -> NDArray[np.float64]:
    (prediction,) = json.loads(body)["predictions"]
    return np.array(list(prediction["probabilities"].values()))


def _by_row(body: bytes, headers: Mapping[str, str]) -> NDArray[np.float64]:
    """{"predictions": [[...]]}, or the rows alone."""
    document: Any = json.loads(body)
    (row,) = document["predictions"] if isinstance(document, dict) else document
    return np.array(row)


def _by_bytes(body: bytes, headers: Mapping[str, str]) -> NDArray[np.float64]:
    return np.frombuffer(body, "<f4", offset=int(headers[JSON_LENGTH])).astype(np.float64)
