"""The description of the routes (OpenAPI 3.1), made from the models of their bodies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from llm_infer.server.options import OPEN

if TYPE_CHECKING:
    from llm_infer.server.app import RouteInfo

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ERRORS = {
    "400": "A field is wrong, or the request cannot fit.",
    "401": "No valid key.",
    "403": "Not allowed from here.",
    "404": "No such model.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "Too much waits already.",
    "431": "Too many headers.",
    "500": "The server failed.",
    "503": "The server is not ready, or stops.",
    "504": "The request took too long.",
}


def openapi(routes: Iterable[RouteInfo], names: Sequence[str]) -> dict[str, Any]:
    """Returns the description; the model is one of `names`."""
    routes = list(routes)
    bodies: list[type[BaseModel]] = [route.body for route in routes if route.body is not None]
    _, schemas = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    defined = schemas.get("$defs", {})
    for body in bodies:
        defined[body.__name__]["properties"]["model"] = {"anyOf": [{"enum": list(names)}, {"type": "null"}]}
    paths: dict[str, Any] = {}
    for route in routes:
        path = route.path.replace(":path", "")
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, names)
    return {
        "openapi": "3.1.0",
        "info": {"title": "llm-infer", "version": "1", "description": "OpenAI's interface to one model."},
        "paths": paths,
        "components": {
            "schemas": {**defined, "Error": ERROR},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"bearer": []}],
    }


def _operation(route: RouteInfo, names: Sequence[str]) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if route.path == "/metrics":
        content = {"text/plain": {"schema": {"type": "string"}}}
    if route.stream:
        content["text/event-stream"] = {"schema": {}}  # of each event
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    for status, text in ERRORS.items():
        responses[status] = {"description": text, "content": error}
    if route.path in OPEN:
        responses["503"] = {"description": "Not ready.", "content": content}
    operation: dict[str, Any] = {
        "operationId": route.handler.__name__ + ("_ping" if route.path == "/ping" else ""),
        "summary": (route.handler.__doc__ or "").strip().splitlines()[0],
        "responses": responses,
    }
    if route.path in OPEN:
        operation["security"] = []
    if "{name" in route.path:
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"enum": list(names)}}]
    if route.body is not None:
        schema = {"$ref": f"#/components/schemas/{route.body.__name__}"}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation
