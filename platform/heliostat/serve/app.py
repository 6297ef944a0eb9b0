"""The HTTP application of a replica: a shelf of versions in, answers out, with or without Ray."""

from collections.abc import Sequence
from datetime import datetime

from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.convertors import Convertor, register_url_convertor
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from heliostat.registry import Version
from heliostat.serve import embeddings, explain, openai, openapi, predict, v2
from heliostat.serve.door import Door, Limits
from heliostat.serve.gate import visit_of
from heliostat.serve.identity import Identity
from heliostat.serve.openapi import (
    TEXT,
    WHOLE,
    Paths,
    a_list,
    an_object,
    name_parameter,
    operation,
)
from heliostat.serve.replies import ERROR_HANDLERS, reply
from heliostat.serve.shelf import Shelf
from heliostat.signature import Classes, NextToken, Numbers, output_from_json
from heliostat.spec import NAME_PATTERN

PROTOCOLS = (
    predict.list_routes,
    explain.list_routes,
    v2.list_routes,
    openai.list_routes,
    embeddings.list_routes,
)
PATHS = (
    predict.list_paths,
    explain.list_paths,
    v2.list_paths,
    openai.list_paths,
    embeddings.list_paths,
)


class ModelName(Convertor[str]):
    """A name in a path, which ends where a verb begins: `digits` in `digits:predict`."""

    regex = NAME_PATTERN.pattern

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("model", ModelName())


def build_app(shelf: Shelf, limits: Limits) -> Starlette:
    """The routes of every protocol over the models of `shelf`."""
    door = Door(limits)

    async def healthz(request: Request) -> Response:
        return reply(to_json({"status": "ok"}))

    async def list_models(request: Request) -> Response:
        may_use = visit_of(request).may_use
        versions = [shelf.find(name) for name in shelf.models if may_use(name)]
        listed = {
            "models": [describe(version) for version in versions],
            "object": "list",  # this and the next are the same to clients of OpenAI
            "data": [describe_briefly(version) for version in versions],
        }
        return reply(to_json(listed))

    async def describe_model(request: Request) -> Response:
        version = shelf.find(request.path_params["name"])
        return reply(to_json(describe(version) | describe_briefly(version)))

    async def describe_api(request: Request) -> Response:
        may_use = visit_of(request).may_use
        versions = [shelf.find(name) for name in shelf.models if may_use(name)]
        parts = (list_paths(versions) for list_paths in (list_own_paths, *PATHS))
        return reply(to_json(openapi.render(parts)))

    routes = [
        *(route for list_routes in PROTOCOLS for route in list_routes(shelf, door)),
        Route("/healthz", healthz),
        Route("/openapi.json", describe_api),
        Route("/v1/models", list_models),
        Route("/v1/models/{name:model}", describe_model),
    ]
    named = Middleware(Identity)
    app = Starlette(routes=routes, middleware=[named], exception_handlers=ERROR_HANDLERS)
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


def list_own_paths(versions: Sequence[Version]) -> Paths:
    models = a_list({"type": "object", "required": ["name", "version"]})
    model = operation(
        "What a model predicts, and its version",
        an_object(name=TEXT, version=WHOLE, id=TEXT, object=TEXT, created=WHOLE, owned_by=TEXT),
        name="describe_model",
        parameters=[name_parameter(versions)],
    )
    health = operation("Whether the server runs", an_object(status=TEXT), name="health")
    served = operation("What is served", an_object(models=models), name="list_models")
    document = operation("This document", {"type": "object"}, name="describe_api")
    return {
        "/healthz": {"get": health},
        "/openapi.json": {"get": document},
        "/v1/models": {"get": served},
        "/v1/models/{name}": {"get": model},
    }
