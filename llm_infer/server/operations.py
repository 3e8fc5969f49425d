"""Routes for those who run the server: health, load, version, metrics, and the list of models."""

from __future__ import annotations

import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from llm_infer.server.errors import ApiError
from llm_infer.server.exchange import Exchange
from llm_infer.server.service import Service


async def health(exchange: Exchange, _: bytes) -> None:
    """Answers 200 where requests are taken, 503 before and after, with how far it is."""
    service = exchange.service
    content: dict[str, Any] = {"status": service.state}
    if service.state == "compiling":
        content |= {"done": service.done, "of": service.total}
    if service.state == "ready":
        # A long step is no fault: it is said, and whoever asks may judge.
        content["seconds_since_last_step"] = round(time.monotonic() - service.engine.last_step, 3)
    await exchange.reply(content, 200 if service.state == "ready" else 503)


async def alive(exchange: Exchange, _: bytes) -> None:
    """Answers 200 as long as the process can answer and its engine has not ended."""
    state = exchange.service.state
    await exchange.reply({"status": "dead" if state == "dead" else "alive"}, 503 if state == "dead" else 200)


async def root(exchange: Exchange, _: bytes) -> None:
    """Answers that there is a server."""
    await exchange.reply({"server": "llm-infer", "version": own_version(), "routes": "/openapi.json"})


async def load(exchange: Exchange, _: bytes) -> None:
    """Answers how much is asked at the moment."""
    service = exchange.service
    stats = service.stats
    await exchange.reply(
        {
            "server_load": service.num_active - 1,  # without this request
            "num_requests_running": stats.running,
            "num_requests_waiting": stats.waiting,
            "kv_cache_usage_perc": stats.page_usage,
        }
    )


async def show_version(exchange: Exchange, _: bytes) -> None:
    """Answers with the version."""
    await exchange.reply({"version": own_version()})


async def metrics(exchange: Exchange, _: bytes) -> None:
    """Answers with figures in Prometheus' text format."""
    await exchange.reply(
        exchange.service.metrics.text(), headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"}
    )


async def models(exchange: Exchange, _: bytes) -> None:
    """Answers with the models that are served: one, under each of its names."""
    service = exchange.service
    found = [_model(service, name) for name in service.names]
    await exchange.reply({"object": "list", "data": found})


async def model(exchange: Exchange, _: bytes) -> None:
    """Answers with one model."""
    name = exchange.scope["path_params"]["name"]
    if name not in exchange.service.names:
        raise ApiError(404, "this model is not served here: see /v1/models", param="model", code="model_not_found")
    await exchange.reply(_model(exchange.service, name))


def _model(service: Service, name: str) -> dict[str, Any]:
    ready = service.state in ("ready", "draining")
    length = service.session.engine.max_model_len if ready else service.engine_options.max_model_len
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "llm-infer",
        "root": service.names[0],
        "parent": None,
        "max_model_len": length,
    }


def own_version() -> str:
    """Returns the version of this package."""
    try:
        return version("llm-infer")
    except PackageNotFoundError:
        return "0"
