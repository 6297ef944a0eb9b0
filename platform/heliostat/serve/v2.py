"""The Open Inference Protocol, version 2, as KServe and Triton speak it, with binary tensors."""

import asyncio
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from heliostat import __version__
from heliostat.data.features import Columns, TextFeatures, features_from_json
from heliostat.registry import NUMBER, Version
from heliostat.serve.door import Door, within
from heliostat.serve.examples import make_question
from heliostat.serve.gate import visit_of
from heliostat.serve.inputs import (
    MAX_LISTED,
    classify,
    list_inputs,
    list_outputs,
)
from heliostat.serve.openapi import (
    NUMBER_PARAMETER,
    TEXT,
    TRUE,
    WHOLE,
    Json,
    Paths,
    a_list,
    an_object,
    json_body,
    name_parameter,
    operation,
)
from heliostat.serve.protocol import check_finite, count_rows
from heliostat.serve.reading import SHORT_TENSOR_BYTES, is_short, read
from heliostat.serve.replies import JSON_TYPE, NO_MODEL, Refusal, reply
from heliostat.serve.shelf import Served, Shelf
from heliostat.serve.tensors import (
    BYTES,
    DTYPES,
    HEADER_LENGTH,
    OutputPart,
    Question,
    are_numbers,
    parse_question,
    render_answer,
)
from heliostat.signature import output_from_json

EXTENSIONS = ["binary_tensor_data", "classification"]
BINARY_TYPE = "application/octet-stream"
PLATFORM = "heliostat"
TENSOR = an_object(name=TEXT, datatype={"enum": [*DTYPES, BYTES]}, shape=a_list(WHOLE))


def list_routes(shelf: Shelf, door: Door) -> list[Route]:
    async def describe_server(request: Request) -> Response:
        server = {"name": PLATFORM, "version": __version__, "extensions": EXTENSIONS}
        return reply(to_json(server))

    async def live(request: Request) -> Response:
        return reply(to_json({"live": True}))

    async def ready(request: Request) -> Response:
        return reply(to_json({"ready": True}))

    async def describe_model(request: Request) -> Response:
        version = shelf.find(*_wanted(request))
        numbers = [str(known.number) for known in shelf.models[version.name]]
        return reply(to_json(describe(version, numbers)))

    async def model_ready(request: Request) -> Response:
        version = shelf.find(*_wanted(request))
        return reply(to_json({"name": version.name, "ready": True}))

    async def infer(request: Request, body: bytes) -> Response:
        began = asyncio.get_running_loop().time()
        visit, served = visit_of(request), await shelf.get(*_wanted(request))
        visit.version = served.version.number
        _check_encoding(request)
        features, length = served.predictor.features, request.headers.get(HEADER_LENGTH)

        def parse() -> tuple[Question, Columns]:
            question, tensors = parse_question(body, length)
            return question, served.interface.read(tensors)

        short = is_short(features, body)
        are_few = len(body) <= SHORT_TENSOR_BYTES
        question, columns = await read(parse, short or (are_few and are_numbers(body, length)))
        rows = count_rows(columns)
        may_hold = short or not isinstance(features, TextFeatures)
        async with within(question.parameters.seconds, began):
            values = await served.batcher.run(columns, rows, may_hold)
        visit.count(rows=rows)
        check_finite(values, "inputs[0].data")
        return _answer(served, question, values)

    model = "/v2/models/{name}"
    prefixes = (model, model + "/versions/{number}")
    return [
        *(Route(f"{prefix}/infer", door.guard(infer), methods=["POST"]) for prefix in prefixes),
        Route("/v2", describe_server),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        *(Route(prefix, describe_model) for prefix in prefixes),
        *(Route(f"{prefix}/ready", model_ready) for prefix in prefixes),
    ]


def list_paths(versions: Sequence[Version]) -> Paths:
    name = name_parameter(versions)
    slots = a_list(an_object(name=TEXT, datatype=TEXT, shape=a_list(WHOLE)))
    metadata = an_object(
        name=TEXT, versions=a_list(TEXT), platform=TEXT, inputs=slots, outputs=slots
    )
    answer = an_object(model_name=TEXT, model_version=TEXT, outputs=a_list(TENSOR))
    examples = {
        version.name: make_question(features_from_json(version.features)) for version in versions
    }
    question = an_object(inputs=a_list(TENSOR))
    body = {JSON_TYPE: json_body(question, examples), BINARY_TYPE: {"schema": {}}}

    def get(summary: str, answer: Json, name: str, *parameters: Json) -> Json:
        found = operation(summary, answer, name=name, parameters=parameters, error="FlatError")
        return {"get": found}

    paths = {
        "/v2": get(
            "The server and its extensions of the protocol",
            an_object(name=TEXT, version=TEXT, extensions=a_list(TEXT)),
            "v2_server",
        ),
        "/v2/health/live": get("Whether the server runs", an_object(live=TRUE), "v2_live"),
        "/v2/health/ready": get("Whether it answers", an_object(ready=TRUE), "v2_ready"),
    }
    for suffix, parameters in (("", [name]), ("/versions/{number}", [name, NUMBER_PARAMETER])):
        model, tail = "/v2/models/{name}" + suffix, "_version" if suffix else ""
        post = operation(
            "Outputs of a model, as JSON or as bytes, for inputs as JSON or as bytes",
            answer,
            name=f"v2_infer{tail}",
            body=body,
            parameters=parameters,
            error="FlatError",
        )
        ready = an_object(name=TEXT, ready=TRUE)
        paths |= {
            model: get("Inputs and outputs of a model", metadata, f"v2_model{tail}", *parameters),
            f"{model}/ready": get(
                "Whether a model is served", ready, f"v2_model_ready{tail}", *parameters
            ),
            f"{model}/infer": {"post": post},
        }
    return paths


def describe(version: Version, numbers: list[str]) -> dict[str, Any]:
    """The metadata of a model whose versions are `numbers`; what training recorded says it all."""
    features, output = features_from_json(version.features), output_from_json(version.output)
    return {
        "name": version.name,
        "versions": numbers,
        "platform": PLATFORM,
        "inputs": [slot.to_json() for slot in list_inputs(features)],
        "outputs": [slot.to_json() for slot in list_outputs(output)],
    }


def _wanted(request: Request) -> tuple[str, int | None]:
    """Raises Refusal: 404, the version is not a number."""
    name, number = request.path_params["name"], request.path_params.get("number")
    if number is None:
        return name, None
    if not re.fullmatch(NUMBER, number):
        raise Refusal(404, NO_MODEL)
    return name, int(number)


def _check_encoding(request: Request) -> None:
    headers = request.headers
    if "content-encoding" in headers:
        raise Refusal(415, "send the body as it is, without content-encoding", "content-encoding")
    kind = headers.get("content-type", BINARY_TYPE).partition(";")[0].strip().lower()
    if kind not in (JSON_TYPE, BINARY_TYPE):
        raise Refusal(415, f"send {JSON_TYPE} or {BINARY_TYPE}")


def _answer(served: Served, question: Question, values: NDArray[np.float32]) -> Response:
    interface, is_binary = served.interface, question.parameters.binary_data_output
    wanted = question.outputs or [OutputPart(name=name) for name in interface.outputs]
    answers = []
    names = set[str]()
    for index, part in enumerate(wanted):
        field = f"outputs[{index}].name"
        if part.name not in interface.outputs:
            listed = ", ".join(list(interface.outputs)[:MAX_LISTED])
            raise Refusal(422, f"{field} is unknown, the outputs are {listed}", field)
        if part.name in names:
            raise Refusal(422, f"{field} is given twice", field)
        names.add(part.name)
        answer, most = interface.write(part.name, values), part.parameters.classification
        if most is not None:
            answer = classify(interface.output, answer, most)
        chosen = part.parameters.binary_data
        answers.append((answer, is_binary if chosen is None else chosen))
    document: dict[str, Any] = {
        "model_name": served.version.name,
        "model_version": str(served.version.number),
    }
    if question.id is not None:
        document["id"] = question.id
    content, length = render_answer(document, answers)
    if length is None:
        return reply(content)
    return reply(content, BINARY_TYPE, {HEADER_LENGTH: str(length)})
