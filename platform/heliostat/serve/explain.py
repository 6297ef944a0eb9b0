"""Why a model answers as it does: raw inputs in, attributions out, beside predictions."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import orjson
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from heliostat.data.features import Columns, Features, features_from_json
from heliostat.errors import HeliostatError
from heliostat.evaluate import Predictor
from heliostat.explain import Method, explain
from heliostat.registry import Version
from heliostat.serve.body import Part, check, parse_json
from heliostat.serve.door import Door, Room
from heliostat.serve.examples import make_instance
from heliostat.serve.gate import visit_of
from heliostat.serve.openapi import (
    ANYTHING,
    NUMBER_SCHEMA,
    TEXT,
    WHOLE,
    Paths,
    a_list,
    an_object,
    json_body,
    name_parameter,
    operation,
)
from heliostat.serve.protocol import count_rows, parse_rows, split_document
from heliostat.serve.reading import read
from heliostat.serve.replies import JSON_TYPE, Refusal, reply
from heliostat.serve.shelf import Shelf

# A thread of its own, so that predictions wait for no explanation.
EXPLAIN_POOL = ThreadPoolExecutor(1, "explain")
MAX_EXPLAINED = 16
MAX_WAITING = 8
BUDGET_SHARE = 0.8  # of the time that a request has, so that the answer still arrives


class Options(Part):
    """`budget_ms` is for all instances; `window` is the side in pixels of what occlusion covers."""

    target: Annotated[str, Field(max_length=1024)] | None = None
    method: Method = "integrated_gradients"
    budget_ms: Annotated[int, Field(ge=1, le=600_000)] = 1000
    window: Annotated[int, Field(ge=1, le=4096)] | None = None


def list_routes(shelf: Shelf, door: Door) -> list[Route]:
    room = Room(MAX_WAITING)
    most_seconds = BUDGET_SHARE * door.limits.request_timeout_s

    async def answer(request: Request, body: bytes) -> Response:
        visit, served = visit_of(request), await shelf.get(request.path_params["name"])
        visit.version = served.version.number
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != JSON_TYPE:
            raise Refusal(415, f"send {JSON_TYPE}")
        features = served.predictor.features
        columns, options = await read(partial(parse_body, features, body), is_short=False)
        seconds = min(options.budget_ms / 1000, most_seconds)
        with room:
            end = time.monotonic() + seconds
            work = partial(explain_rows, served.predictor, columns, options, end)
            found = await asyncio.get_running_loop().run_in_executor(EXPLAIN_POOL, work)
        visit.count(rows=len(found))
        version = served.version
        document = {
            "model": version.name,
            "version": version.number,
            "budget_ms": round(1000 * seconds),
            "explanations": found,
        }
        return reply(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY))

    return [Route("/v1/models/{name}:explain", door.guard(answer), methods=["POST"])]


def list_paths(versions: Sequence[Version]) -> Paths:
    examples = {
        version.name: {"instances": [instance], "budget_ms": 200}
        for version in versions
        if (instance := make_instance(features_from_json(version.features))) is not None
    }
    options = Options.model_json_schema()["properties"]
    body = {
        "type": "object",
        "required": ["instances"],
        "properties": {"instances": {**a_list(ANYTHING), "maxItems": MAX_EXPLAINED}, **options},
    }
    explanation = an_object(
        target=TEXT,
        score=NUMBER_SCHEMA,
        baseline_score=NUMBER_SCHEMA,
        gap=NUMBER_SCHEMA,
        method=TEXT,
        steps=WHOLE,
        baseline=TEXT,
        attributions=ANYTHING,
    )
    answer = an_object(model=TEXT, version=WHOLE, budget_ms=WHOLE, explanations=a_list(explanation))
    post = operation(
        "What each input of an instance adds to the score of a class, or to a number",
        answer,
        name="explain",
        body={JSON_TYPE: json_body(body, examples)},
        parameters=[name_parameter(versions)],
    )
    return {"/v1/models/{name}:explain": {"post": post}}


def parse_body(features: Features, body: bytes) -> tuple[Columns, Options]:
    """Raises Refusal: 400 not JSON, 422 a value that the model cannot take, or an option."""
    instances, given = split_document(parse_json(body))
    options = check(Options, given)
    return parse_rows(features, instances, MAX_EXPLAINED), options


def explain_rows(
    predictor: Predictor, columns: Columns, options: Options, end: float
) -> list[dict[str, Any]]:
    """An explanation of each row; those that are left share the time until `end` on the clock.

    Raises:
        Refusal: 422, the row or an option does not suit the model.
    """
    rows, found = count_rows(columns), []
    for index in range(rows):
        row = {name: values[index : index + 1] for name, values in columns.items()}
        stop = time.monotonic() + (end - time.monotonic()) / (rows - index)
        try:
            explanation = explain(
                predictor,
                row,
                options.target,
                options.method,
                options.window,
                lambda stop=stop: stop - time.monotonic(),  # type: ignore[misc]
            )
        except HeliostatError as error:
            raise Refusal(422, f"instances[{index}]: {error}", f"instances[{index}]") from error
        found.append(asdict(explanation))
    return found
