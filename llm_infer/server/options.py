"""What a server may be told beside the engine's settings; each is a flag of `llm-infer serve`."""

from __future__ import annotations

import ipaddress
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_infer.base.errors import UserError
from llm_infer.base.files import read_text
from llm_infer.server.logs import FORMATS
from llm_infer.server.sampling import checked_defaults
from llm_infer.text.chat_prompt import checked_variables
from llm_infer.text.chat_template import why_invalid

MIB = 1 << 20

OPEN = frozenset({"/health", "/ping", "/live"})
"""Routes that need no key: they carry no data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where a server listens, whom it answers, and how much it takes on.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        uds: path of a Unix socket, in place of host and port.
        served_model_names: names under which clients may ask for the model; the first is shown. None: the model's own.
        api_keys: texts, one of which clients must send; none: everybody may ask.
        allowed_hosts: names that a request's Host header may have beside those of this machine; "*" allows all. Only
            checked where the server listens on this machine alone: there it keeps web pages of others out.
        allowed_origins: web pages (scheme, name and port) whose scripts may ask.
        chat_template: Jinja source in place of the model's template; None takes the model's.
        default_chat_template_kwargs: variables of the template that requests need not give.
        tool_call_parser, reasoning_parser: names of the formats in which the model writes calls and reasoning; None takes
            what its template shows, "none" leaves all in the text.
        default_sampling: parameters for requests that do not name them, by the names of generation_config.json.
        max_num_queued_requests: most requests that wait for their first step.
        max_num_queued_tokens: most prompt tokens of those.
        overload_status: status of a request that is one too many, 429 or 503.
        max_body_bytes: most bytes of a request's body.
        body_timeout: seconds in which a body must have come.
        stall_timeout: seconds after which a reader that takes nothing is given up.
        request_timeout: most seconds for one request; None sets no limit.
        keep_alive: seconds for which an idle connection stays open, longer than that of proxies in front.
        sse_keep_alive: seconds of silence in a stream after which a comment shows that it lives.
        shutdown_timeout: seconds that requests have to end after SIGTERM.
        strict_fields: refuse fields of requests that nobody knows, instead of naming them in a header.
        warm_up: "generation" is ready with the programs of generation, "all" with every program, "none" at once.
        exit_on_engine_death: end the process where the engine cannot go on.
        metrics_prefix: what names of metrics begin with.
        log_format: "text" or "json".
        log_requests: write a line for each request.
        otlp_traces_endpoint: address of a collector of traces.
        ssl_certfile, ssl_keyfile: files for TLS.

    Raises:
        UserError: a value does not fit.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    served_model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    chat_template: str | None = None
    default_chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    default_sampling: Mapping[str, Any] = field(default_factory=dict)
    max_num_queued_requests: int = 512
    max_num_queued_tokens: int = 1 << 20
    overload_status: int = 429
    max_body_bytes: int = 8 * MIB
    body_timeout: float = 30.0
    stall_timeout: float = 60.0
    request_timeout: float | None = None
    keep_alive: float = 90.0
    sse_keep_alive: float = 15.0
    shutdown_timeout: float = 30.0
    strict_fields: bool = False
    warm_up: str = "generation"
    exit_on_engine_death: bool = False
    metrics_prefix: str = "llm_infer"
    log_format: str = "text"
    log_requests: bool = True
    otlp_traces_endpoint: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None

    def __post_init__(self) -> None:
        if self.overload_status not in (429, 503):
            raise UserError(f"--overload-status {self.overload_status}: expected 429 or 503")
        if self.warm_up not in ("generation", "all", "none"):
            raise UserError(f"--warm-up {self.warm_up}: expected generation, all or none")
        if self.log_format not in FORMATS:
            raise UserError(f"--log-format {self.log_format}: expected text or json")
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port {self.port}: expected 0 to 65535")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise UserError("--ssl-certfile and --ssl-keyfile belong together: give both, or none")
        for name in ("max_num_queued_requests", "max_num_queued_tokens", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected a whole number above 0")
        for name in (
            "body_timeout",
            "stall_timeout",
            "request_timeout",
            "keep_alive",
            "sse_keep_alive",
            "shutdown_timeout",
        ):
            value = getattr(self, name)
            if value is not None and not (
                math.isfinite(value) and (value > 0 or (name, value) == ("shutdown_timeout", 0))
            ):
                raise UserError(f"--{name.replace('_', '-')} {value}: expected a number of seconds above 0")
        if not all(self.served_model_names) or not self.metrics_prefix:
            raise UserError("--served-model-name and --metrics-prefix: expected names that are not empty")
        if self.chat_template is not None and (problem := why_invalid(self.chat_template)) is not None:
            raise UserError(f"--chat-template: {problem}")
        try:
            checked_variables(self.default_chat_template_kwargs)
        except UserError as error:
            raise UserError(f"--default-chat-template-kwargs: {error}") from None
        try:
            checked_defaults(self.default_sampling)
        except UserError as error:
            raise UserError(f"--override-generation-config: {error}") from None
        for key in self.api_keys:
            if not key or not key.isascii() or any(char.isspace() for char in key):
                raise UserError("--api-key: expected printable ASCII characters without spaces")

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the server over the network."""
        if self.uds is not None:
            return False
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def read_api_keys(given: tuple[str, ...], file: str | None) -> tuple[str, ...]:
    """Returns the keys that were typed, those of a file (one in a line, # begins a comment) and that of LLM_INFER_API_KEY.

    Raises:
        UserError: the file cannot be read or has no key.
    """
    keys = [*given]
    if key := os.environ.get("LLM_INFER_API_KEY"):
        keys.append(key)
    if file is not None:
        lines = [line.strip() for line in read_text(file, f"--api-key-file {file}").splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise UserError(f"--api-key-file {file}: it has no key; expected one in a line")
        keys += found
    return tuple(dict.fromkeys(keys))


def shown_name(model: str | os.PathLike[str]) -> str:
    """Returns the name of a model for clients: a hub id as it is, of a path only its last part."""
    text = str(model)
    return Path(text).name if os.path.exists(text) else text
