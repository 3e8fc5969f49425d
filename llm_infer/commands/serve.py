"""`llm-infer serve`: an OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from typing import Annotated, Any

import typer

from llm_infer.base.errors import UserError
from llm_infer.base.files import parsed_json, read_text
from llm_infer.commands.options import Quiet, Threads, existing_model, takes_engine_options
from llm_infer.options import EngineOptions

NEEDED = ("starlette", "uvicorn", "httptools", "pydantic", "prometheus_client")


@takes_engine_options()
def serve(
    model_name: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="The model, as --model names it.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.")] = 8000,
    uds: Annotated[str | None, typer.Option(metavar="PATH", help="Unix socket, in place of host and port.")] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Name of the model for clients; may be repeated.")
    ] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Key that clients send; may be repeated.")
    ] = None,
    api_key_file: Annotated[str | None, typer.Option(metavar="FILE", help="File with keys, one in a line.")] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Further Host header to accept on loopback.")
    ] = None,
    allowed_origin: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Web page that may ask (CORS); may be repeated.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(metavar="FILE", help="Chat template in place of the model's.")
    ] = None,
    default_chat_template_kwargs: Annotated[
        str | None, typer.Option(metavar="JSON", help="Variables of the chat template.")
    ] = None,
    override_generation_config: Annotated[
        str | None, typer.Option(metavar="JSON", help="Sampling of requests that do not name it.")
    ] = None,
    tool_call_parser: Annotated[
        str | None, typer.Option(metavar="NAME", help="Form of the model's tool calls; else its template's.")
    ] = None,
    reasoning_parser: Annotated[
        str | None, typer.Option(metavar="NAME", help="Form of the model's reasoning; else its template's.")
    ] = None,
    max_num_queued_reqs: Annotated[int, typer.Option(metavar="N", help="Most requests that wait.")] = 512,
    max_num_queued_tokens: Annotated[int, typer.Option(metavar="N", help="Most prompt tokens that wait.")] = 1 << 20,
    overload_status: Annotated[int, typer.Option(metavar="429|503", help="Status when too much waits.")] = 429,
    max_body_bytes: Annotated[int, typer.Option(metavar="N", help="Most bytes of a request's body.")] = 8 << 20,
    request_timeout: Annotated[float | None, typer.Option(metavar="S", help="Most seconds for one request.")] = None,
    keep_alive: Annotated[float, typer.Option(metavar="S", help="Seconds that idle connections stay open.")] = 90.0,
    sse_keep_alive_interval: Annotated[
        float, typer.Option(metavar="S", help="Seconds of silence before a comment in a stream.")
    ] = 15.0,
    shutdown_timeout: Annotated[float, typer.Option(metavar="S", help="Seconds to end requests after SIGTERM.")] = 30.0,
    strict_fields: Annotated[bool, typer.Option("--strict-fields", help="Refuse unknown fields of requests.")] = False,
    warm_up: Annotated[
        str, typer.Option(metavar="generation|all|none", help="Programs to compile before it is ready.")
    ] = "generation",
    exit_on_engine_death: Annotated[
        bool, typer.Option("--exit-on-engine-death", help="End the process where the engine cannot go on.")
    ] = False,
    metrics_prefix: Annotated[
        str, typer.Option(metavar="NAME", help="What names of metrics begin with.")
    ] = "llm_infer",
    log_format: Annotated[str, typer.Option(metavar="text|json", help="How lines about requests look.")] = "text",
    otlp_traces_endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Collector of traces (OTLP over HTTP).")
    ] = None,
    ssl_certfile: Annotated[str | None, typer.Option(metavar="FILE", help="Certificate for TLS.")] = None,
    ssl_keyfile: Annotated[str | None, typer.Option(metavar="FILE", help="Key of the certificate.")] = None,
    threads: Threads = None,
    quiet: Quiet = False,
    *,
    options: EngineOptions,
) -> None:
    """Serves the model over HTTP, as OpenAI's interface.

    Clients find it at http://127.0.0.1:8000/v1.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serve needs {', '.join(missing)}: pip install 'llm-infer[server]'")
    from llm_infer.server.options import ServerOptions, read_api_keys

    if model_name is not None:
        options = replace(options, model=existing_model(model_name))
    server_options = ServerOptions(
        host=host,
        port=port,
        uds=uds,
        served_model_names=tuple(served_model_name or ()),
        api_keys=read_api_keys(tuple(api_key or ()), api_key_file),
        allowed_hosts=tuple(allowed_host or ()),
        allowed_origins=tuple(allowed_origin or ()),
        chat_template=None if chat_template is None else read_text(chat_template, f"--chat-template {chat_template}"),
        default_chat_template_kwargs=_mapping("--default-chat-template-kwargs", default_chat_template_kwargs),
        default_sampling=_mapping("--override-generation-config", override_generation_config),
        tool_call_parser=tool_call_parser,
        reasoning_parser=reasoning_parser,
        max_num_queued_requests=max_num_queued_reqs,
        max_num_queued_tokens=max_num_queued_tokens,
        overload_status=overload_status,
        max_body_bytes=max_body_bytes,
        request_timeout=request_timeout,
        keep_alive=keep_alive,
        sse_keep_alive=sse_keep_alive_interval,
        shutdown_timeout=shutdown_timeout,
        strict_fields=strict_fields,
        warm_up=warm_up,
        exit_on_engine_death=exit_on_engine_death,
        metrics_prefix=metrics_prefix,
        log_format=log_format,
        log_requests=not quiet,
        otlp_traces_endpoint=otlp_traces_endpoint,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
    )
    from llm_infer.parallel.distributed import on_cluster

    if options.coordinator_address is not None or on_cluster():
        from llm_infer.starting import take_part

        if take_part(options):  # not the first of several hosts: it computes what that one does, until it ends
            return
    from llm_infer.server.run import serve as run

    if status := run(replace(options, progress=options.progress and not quiet), server_options):
        sys.exit(status)


def _mapping(flag: str, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    found = parsed_json(text, flag)
    if not isinstance(found, dict):
        raise UserError(f"{flag} {json.dumps(found):.60}: expected a JSON object")
    return found
