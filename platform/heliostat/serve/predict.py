"""The simple route: raw inputs in, names and probabilities out."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from heliostat.serve.door import Door
from heliostat.serve.gate import visit_of
from heliostat.serve.protocol import count_rows, parse_body, render_predictions
from heliostat.serve.replies import reply
from heliostat.serve.shelf import Shelf


def list_routes(shelf: Shelf, door: Door) -> list[Route]:
    async def predict(request: Request, body: bytes) -> Response:
        visit, served = visit_of(request), await shelf.get(request.path_params["name"])
        version, predictor = served.version, served.predictor
        visit.version = version.number
        columns = parse_body(predictor.features, request.headers.get("content-type", ""), body)
        rows = count_rows(columns)
        values = await served.batcher.run(columns, rows)
        visit.count(rows=rows)
        return reply(render_predictions(version.name, version.number, predictor.output, values))

    return [Route("/v1/models/{name}:predict", door.guard(predict), methods=["POST"])]
