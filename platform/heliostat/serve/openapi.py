"""What every route takes and gives, as values: the OpenAPI 3.1 document of a replica."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from heliostat import __version__
from heliostat.registry import NUMBER, Version
from heliostat.serve.replies import ERROR_TYPES, JSON_TYPE

Json = dict[str, Any]
Paths = dict[str, Json]

ERRORS = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"$ref": "#/components/schemas/Problem"}},
    },
    "Problem": {
        "type": "object",
        "required": ["type", "message", "field", "request_id"],
        "properties": {
            "type": {"enum": list(ERROR_TYPES.values())},
            "message": {"type": "string", "description": "one sentence"},
            "field": {"type": ["string", "null"], "description": "the path of what is wrong"},
            "request_id": {"type": "string"},
        },
    },
    "FlatError": {
        "type": "object",
        "required": ["error", "type", "field", "request_id"],
        "properties": {
            "error": {"type": "string", "description": "one sentence"},
            "type": {"enum": list(ERROR_TYPES.values())},
            "field": {"type": ["string", "null"]},
            "request_id": {"type": "string"},
        },
    },
}


def render(paths: Iterable[Paths]) -> Json:
    """The document of these parts."""
    merged: Paths = {}
    for part in paths:
        merged |= part
    return {
        "openapi": "3.1.0",
        "info": {"title": "Heliostat", "version": __version__},
        "paths": merged,
        "components": {"schemas": ERRORS},
    }


def operation(
    summary: str,
    answer: Json,
    *,
    name: str,
    body: Mapping[str, Json] | None = None,
    parameters: Sequence[Json] = (),
    error: str = "Error",
) -> Json:
    """One method of a path: `answer` is the schema of 200, `body` the media types that it takes."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{error}"}}}
    document: Json = {
        "operationId": name,
        "summary": summary,
        "responses": {
            "200": {"description": "the answer", "content": {JSON_TYPE: {"schema": answer}}},
            "default": {"description": "what is wrong, in one sentence", "content": content},
        },
    }
    if parameters:
        document["parameters"] = list(parameters)
    if body:
        document["requestBody"] = {"required": True, "content": dict(body)}
    return document


def json_body(schema: Json, examples: Mapping[str, Any]) -> Json:
    """A body of JSON with an example for each name; there may be none."""
    values = {name: {"value": value} for name, value in examples.items() if value is not None}
    return {"schema": schema, **({"examples": values} if values else {})}


def name_parameter(versions: Sequence[Version]) -> Json:
    """`name` in a path: one of the models that are served."""
    schema: Json = {"type": "string"}
    if versions:
        schema["enum"] = sorted(version.name for version in versions)
    return {"name": "name", "in": "path", "required": True, "schema": schema}


NUMBER_PARAMETER: Json = {
    "name": "number",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": f"^{NUMBER}$"},
}


def an_object(**properties: Json) -> Json:
    """The schema of an object that has all of these."""
    return {"type": "object", "required": list(properties), "properties": properties}


def a_list(items: Json) -> Json:
    return {"type": "array", "items": items}


TEXT: Json = {"type": "string"}
WHOLE: Json = {"type": "integer"}
NUMBER_SCHEMA: Json = {"type": "number"}
ANYTHING: Json = {}
TRUE: Json = {"const": True}
