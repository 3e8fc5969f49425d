"""A span of OpenTelemetry for each request that generates, sent to a collector; needs the extra `otel`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from llm_infer.base.errors import UserError


class Tracing:
    """Makes spans; without an endpoint it does nothing.

    Args:
        endpoint: address of a collector that takes OTLP over HTTP, such as `http://127.0.0.1:4318/v1/traces`; None: no spans.
        exporter: where spans go instead, for tests.

    Raises:
        UserError: the libraries are not installed.
    """

    def __init__(self, endpoint: str | None, exporter: Any = None) -> None:
        self._tracer: Any = None
        if endpoint is None and exporter is None:
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise UserError("--otlp-traces-endpoint needs OpenTelemetry: pip install 'llm-infer[otel]'") from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": "llm-infer"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("llm_infer.server")
        self._propagator = TraceContextTextMapPropagator()

    def ended(
        self, route: str, headers: Mapping[str, str], facts: Mapping[str, Any], status: int, seconds: float
    ) -> None:
        """Reports a request that took so many seconds until now, as a child of the span that its headers name."""
        if self._tracer is None:
            return
        from opentelemetry.trace import SpanKind, Status, StatusCode

        end = time.time_ns()
        span = self._tracer.start_span(
            "llm_request",
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            start_time=end - round(seconds * 1e9),
            attributes={"http.route": route, "http.response.status_code": status, **facts},
        )
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(end_time=end)

    def close(self) -> None:
        """Sends what has not been sent."""
        if self._tracer is not None:
            self._provider.shutdown()
