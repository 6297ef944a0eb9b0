"""The simple route: raw inputs in, names and probabilities out."""

from collections.abc import Sequence
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from heliostat.data.features import ImageFeatures, TextFeatures, features_from_json
from heliostat.registry import Version
from heliostat.serve.door import Door
from heliostat.serve.examples import make_instance
from heliostat.serve.gate import visit_of
from heliostat.serve.openapi import (
    ANYTHING,
    TEXT,
    WHOLE,
    Paths,
    a_list,
    an_object,
    json_body,
    name_parameter,
    operation,
)
from heliostat.serve.protocol import (
    IMAGE_TYPES,
    MAX_INSTANCES,
    count_rows,
    parse_body,
    render_predictions,
)
from heliostat.serve.reading import is_short, may_have_files, read
from heliostat.serve.replies import JSON_TYPE, reply
from heliostat.serve.shelf import Shelf


def list_routes(shelf: Shelf, door: Door) -> list[Route]:
    async def predict(request: Request, body: bytes) -> Response:
        visit, served = visit_of(request), await shelf.get(request.path_params["name"])
        version, predictor = served.version, served.predictor
        visit.version = version.number
        features, kind = predictor.features, request.headers.get("content-type", "")
        short = is_short(features, body)
        parse = partial(parse_body, features, kind, body)
        columns = await read(parse, short and not may_have_files(features, body))
        rows = count_rows(columns)
        may_hold = short or not isinstance(features, TextFeatures)
        values = await served.batcher.run(columns, rows, may_hold)
        visit.count(rows=rows)
        return reply(render_predictions(version.name, version.number, predictor.output, values))

    return [Route("/v1/models/{name}:predict", door.guard(predict), methods=["POST"])]


def list_paths(versions: Sequence[Version]) -> Paths:
    features = {version.name: features_from_json(version.features) for version in versions}
    examples = {
        name: {"instances": [instance]}
        for name, of in features.items()
        if (instance := make_instance(of)) is not None
    }
    instances = {**a_list(ANYTHING), "minItems": 1, "maxItems": MAX_INSTANCES}
    body = {JSON_TYPE: json_body(an_object(instances=instances), examples)}
    if any(isinstance(of, ImageFeatures) for of in features.values()):
        body |= {kind: {"schema": {}} for kind in IMAGE_TYPES}
    post = operation(
        "The class, the probabilities or the numbers of each instance",
        an_object(model=TEXT, version=WHOLE, predictions=a_list({"type": "object"})),
        name="predict",
        body=body,
        parameters=[name_parameter(versions)],
    )
    return {"/v1/models/{name}:predict": {"post": post}}
