"""The table of routes, and the ASGI application made of it."""

from __future__ import annotations

import logging
from typing import NamedTuple

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router

from llm_infer.server import logs, operations, tokens
from llm_infer.server.chat import chat_completions
from llm_infer.server.completions import completions
from llm_infer.server.embeddings import embeddings
from llm_infer.server.errors import ApiError
from llm_infer.server.exchange import Endpoint, Exchange, Handler, Receive, Scope, Send
from llm_infer.server.gate import Gate
from llm_infer.server.openapi import openapi
from llm_infer.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from llm_infer.server.service import Service


class RouteInfo(NamedTuple):
    """A route: its path and method, what answers it, the model of its body, and whether it has a path without /v1, too."""

    path: str
    method: str
    handler: Handler
    body: type[BaseModel] | None = None
    alias: bool = False
    stream: bool = False


async def describe(exchange: Exchange, _: bytes) -> None:
    """Answers with the description of all routes."""
    await exchange.reply(openapi(ROUTES, exchange.service.names))


ROUTES = (
    RouteInfo("/v1/models", "GET", operations.models, alias=True),
    RouteInfo("/v1/models/{name:path}", "GET", operations.model, alias=True),
    RouteInfo("/v1/completions", "POST", completions, CompletionRequest, alias=True, stream=True),
    RouteInfo("/v1/chat/completions", "POST", chat_completions, ChatRequest, alias=True, stream=True),
    RouteInfo("/v1/embeddings", "POST", embeddings, EmbeddingRequest, alias=True),
    RouteInfo("/tokenize", "POST", tokens.tokenize, TokenizeRequest),
    RouteInfo("/detokenize", "POST", tokens.detokenize, DetokenizeRequest),
    RouteInfo("/tokenizer_info", "GET", tokens.tokenizer_info),
    RouteInfo("/health", "GET", operations.health),
    RouteInfo("/live", "GET", operations.alive),
    RouteInfo("/ping", "GET", operations.health),
    RouteInfo("/load", "GET", operations.load),
    RouteInfo("/version", "GET", operations.show_version),
    RouteInfo("/metrics", "GET", operations.metrics),
    RouteInfo("/openapi.json", "GET", describe),
    RouteInfo("/", "GET", operations.root),
)
"""All routes; those with an alias stand in the description once."""


class _Answering:
    """Makes answers of the router's own errors: no such path, or not by this method."""

    def __init__(self, router: Router, service: Service) -> None:
        self._router, self._service = router, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] == "http":
            scope["app"] = self  # has the router raise its errors
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            words = {404: "there is no such route: see /openapi.json", 405: "this route has another method: see Allow"}
            found = ApiError(
                error.status_code,
                words.get(error.status_code, "refused"),
                code={404: "route_not_found", 405: "method_not_allowed"}.get(error.status_code),
                headers=error.headers,
            )
            self._service.metrics.answered("-", error.status_code)
            await Exchange(scope, receive, send, self._service).fail(found)


def _note_refusal(service: Service, method: str, request_id: str, error: ApiError) -> None:
    service.metrics.answered("-", error.status)
    log = logging.getLogger(logs.LOGGER)
    logs.request_ended(log, id=request_id, method=method, route="-", status=error.status, seconds=0.0, code=error.code)


def make_app(service: Service) -> object:
    """Returns the ASGI application over a service."""
    service.metrics.watch(service)
    routes = []
    for route in ROUTES:
        endpoint = Endpoint(route.handler, service, route.path)
        paths = [route.path, *([route.path.removeprefix("/v1")] if route.alias else [])]
        routes += [Route(path, endpoint, methods=[route.method]) for path in paths]
    inner = _Answering(Router(routes, redirect_slashes=False), service)
    app: object = Gate(inner, service.options, lambda *facts: _note_refusal(service, *facts))
    if service.options.allowed_origins:
        app = CORSMiddleware(
            app,  # type: ignore[arg-type]
            allow_origins=service.options.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-api-key", "x-request-id"],
            expose_headers=["x-request-id", "x-llm-infer-ignored", "retry-after"],
        )
    return app
