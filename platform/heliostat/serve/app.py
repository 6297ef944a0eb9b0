"""The HTTP application of a replica: a shelf of versions in, answers out, with or without Ray."""

from datetime import datetime

from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from heliostat.registry import Version
from heliostat.serve import embeddings, openai, predict
from heliostat.serve.door import Door, Limits
from heliostat.serve.replies import ERROR_HANDLERS, reply
from heliostat.serve.shelf import Shelf
from heliostat.signature import Classes, NextToken, Numbers, output_from_json

PROTOCOLS = (predict.list_routes, openai.list_routes, embeddings.list_routes)


def build_app(shelf: Shelf, limits: Limits) -> Starlette:
    """The routes of every protocol over the models of `shelf`."""
    door = Door(limits)

    async def healthz(request: Request) -> Response:
        return reply(to_json({"status": "ok"}))

    async def list_models(request: Request) -> Response:
        versions = [shelf.find(name) for name in shelf.models]
        # The second list is the same to clients of OpenAI.
        return reply(
            to_json(
                {
                    "models": [describe(version) for version in versions],
                    "object": "list",
                    "data": [describe_briefly(version) for version in versions],
                }
            )
        )

    routes = [
        Route("/healthz", healthz),
        Route("/v1/models", list_models),
        *(route for list_routes in PROTOCOLS for route in list_routes(shelf, door)),
    ]
    app = Starlette(routes=routes, exception_handlers=ERROR_HANDLERS)
    app.router.redirect_slashes = False
    return app


def describe(version: Version) -> dict[str, object]:
    match output_from_json(version.output):
        case Classes(labels):
            predicts: dict[str, object] = {"classes": labels}
        case Numbers(names):
            predicts = {"numbers": names}
        case NextToken():
            predicts = {"text": True}
    return {"name": version.name, "version": version.number, **predicts}


def describe_briefly(version: Version) -> dict[str, object]:
    created = int(datetime.fromisoformat(version.created).timestamp())
    return {"id": version.name, "object": "model", "created": created, "owned_by": "heliostat"}
