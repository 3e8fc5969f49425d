"""Each request that generates is a span: a child of its client's, with its tokens and times."""

from __future__ import annotations

import sys

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from llm_infer import LLM
from llm_infer.base.errors import UserError
from llm_infer.server.tracing import Tracing
from tests.server.conftest import Served

PARENT = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


def test_a_request_is_a_span(tiny_llm: LLM) -> None:
    served = Served(tiny_llm)
    exporter = InMemorySpanExporter()
    served.service.tracing = Tracing(None, exporter)
    with served.client() as client:
        for stream in (False, True):
            body = {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, "stream": stream}
            client.post("/v1/completions", json=body, headers=PARENT)
        client.get("/health")
    served.stop()  # sends what is there
    spans = exporter.get_finished_spans()
    assert len(spans) == 2
    for span in spans:
        assert span.context is not None and span.parent is not None
        assert f"{span.context.trace_id:x}" == "af7651916cd43dd8448eb211c80319c"
        assert f"{span.parent.span_id:x}" == "b7ad6b7169203331"
        found = dict(span.attributes or {})
        assert found["gen_ai.usage.input_tokens"] == 3 and found["gen_ai.usage.output_tokens"] == 4
        assert found["http.route"] == "/v1/completions" and found["http.response.status_code"] == 200
        assert span.start_time is not None and span.end_time is not None and span.end_time > span.start_time


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UserError, match="otel"):
        Tracing("http://127.0.0.1:1/v1/traces")
