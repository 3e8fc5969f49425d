"""Figures for Prometheus, by vLLM's names behind a prefix of ours."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest

from llm_infer.base.outputs import RequestOutput

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_infer.server.engine_thread import EngineStats, Update
    from llm_infer.server.service import Service

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
LABELS = ("model_name", "engine")
RATE_WINDOW = 30.0
"""Seconds over which the speed is measured that `Retry-After` goes by."""


class Metrics:
    """What a server counts and measures; used on the event loop's thread alone.

    Args:
        prefix: names begin with it and a colon.
        model_name: value of the label.
    """

    def __init__(self, prefix: str, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._prefix, self._labels = prefix, (model_name, "0")
        self._recent: deque[tuple[float, int]] = deque()
        seconds = {
            "time_to_first_token_seconds": "From arrival to the first new token.",
            "inter_token_latency_seconds": "Between two new tokens of a request, averaged over the request.",
            "e2e_request_latency_seconds": "From arrival to the end of a request.",
            "request_queue_time_seconds": "From arrival to the first scheduled token.",
            "request_prefill_time_seconds": "From the first scheduled token to the first new one.",
            "request_decode_time_seconds": "From the first new token to the last.",
            "request_inference_time_seconds": "From the first scheduled token to the last new one.",
            "request_time_per_output_token_seconds": "Decode time for each token after the first.",
        }
        self._seconds = {name: self._histogram(name, text, SECONDS) for name, text in seconds.items()}
        tokens = {
            "request_prompt_tokens": "Tokens of a prompt.",
            "request_generation_tokens": "New tokens of a request.",
        }
        self._tokens = {name: self._histogram(name, text, TOKENS) for name, text in tokens.items()}
        counters = {
            "prompt_tokens": "Tokens of prompts.",
            "prompt_tokens_cached": "Those of them that the prefix cache had.",
            "spec_decode_num_draft_tokens": "Tokens that speculation proposed.",
            "spec_decode_num_accepted_tokens": "Those of them that were right.",
        }
        self._counters = {name: self._counter(name, text) for name, text in counters.items()}
        self._success = self._counter("request_success", "Requests that ended, by reason.", "finished_reason")
        self._rejections = self._counter("admission_rejections", "Requests refused because too much waited.", "reason")
        self._http = self._counter("http_requests", "Answers, by route and status.", "handler", "status")

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(f"{self._prefix}:{name}", text, LABELS, buckets=buckets, registry=self.registry)
        return metric.labels(*self._labels)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        metric = Counter(f"{self._prefix}:{name}", text, (*LABELS, *labels), registry=self.registry)
        return metric if labels else metric.labels(*self._labels)

    def watch(self, service: Service) -> None:
        """Adds the figures that are read from the service when somebody asks."""
        self.registry.register(_Figures(self._prefix, self._labels, service))

    def rejected(self, reason: str) -> None:
        """Counts a request that was one too many."""
        self._rejections.labels(*self._labels, reason).inc()

    def answered(self, handler: str, status: int) -> None:
        """Counts an answer."""
        self._http.labels(*self._labels, handler, str(status)).inc()

    def finished(self, reason: str, count: int = 1) -> None:
        """Counts requests that ended."""
        self._success.labels(*self._labels, reason).inc(count)

    def observe(self, update: Update) -> None:
        """Takes in what an update says of requests that have ended."""
        for seconds in update.first_tokens:
            self._seconds["time_to_first_token_seconds"].observe(seconds)
        if update.error is not None:
            self.finished("error")
        for result in update.results or ():
            if isinstance(result, RequestOutput):
                self._observe(result)
            else:
                self._count_prompt(len(result.prompt_token_ids))
                self.finished("stop")

    def _count_prompt(self, count: int) -> None:
        self._counters["prompt_tokens"].inc(count)
        self._tokens["request_prompt_tokens"].observe(count)
        self._recent.append((time.monotonic(), count))
        while self._recent and self._recent[0][0] < time.monotonic() - RATE_WINDOW:
            self._recent.popleft()

    def _observe(self, result: RequestOutput) -> None:
        new = sum(len(output.token_ids) for output in result.outputs)
        self._count_prompt(len(result.prompt_token_ids))
        self._counters["prompt_tokens_cached"].inc(result.num_cached_tokens)
        self._tokens["request_generation_tokens"].observe(new)
        for output in result.outputs:
            self.finished(output.finish_reason or "abort")
        times = result.metrics
        if times is None:
            return
        self._counters["spec_decode_num_draft_tokens"].inc(times.num_drafted_tokens)
        self._counters["spec_decode_num_accepted_tokens"].inc(times.num_accepted_tokens)
        decode = times.total - times.time_to_first_token
        values = {
            "e2e_request_latency_seconds": times.total,
            "request_queue_time_seconds": times.queue,
            "request_prefill_time_seconds": times.time_to_first_token - times.queue,
            "request_decode_time_seconds": decode,
            "request_inference_time_seconds": times.total - times.queue,
        }
        longest = max(len(output.token_ids) for output in result.outputs)
        if longest > 1:
            values["request_time_per_output_token_seconds"] = decode / (longest - 1)
            values["inter_token_latency_seconds"] = decode / (longest - 1)
        for name, value in values.items():
            self._seconds[name].observe(value)

    def prompt_rate(self) -> float:
        """Returns the prompt tokens in a second of requests that ended lately; 0 if none did."""
        if not self._recent:
            return 0.0
        seconds = time.monotonic() - self._recent[0][0]
        return sum(count for _, count in self._recent) / max(seconds, 1.0)

    def text(self) -> bytes:
        """Returns all figures in Prometheus' text format."""
        return generate_latest(self.registry)


class _Figures:
    """Figures that are kept elsewhere."""

    def __init__(self, prefix: str, labels: tuple[str, ...], service: Service) -> None:
        self._prefix, self._labels, self._service = prefix, labels, service

    def collect(self) -> Iterator[Any]:
        """Yields the figures of this moment."""
        stats: EngineStats = self._service.stats
        gauges = {
            "num_requests_running": ("Sequences that run.", stats.running),
            "num_requests_waiting": ("Sequences that wait.", stats.waiting),
            "kv_cache_usage_perc": ("Share of the pages in use, 0 to 1.", stats.page_usage),
        }
        counters = {
            "prefix_cache_queries": ("Tokens looked up in the prefix cache.", stats.prefix_queries),
            "prefix_cache_hits": ("Those of them that were found.", stats.prefix_hits),
            "num_preemptions": ("Sequences that lost their pages and computed again.", stats.preemptions),
            "copied_pages": ("Pages copied on write.", stats.copied_pages),
            "compiles": ("Step programs compiled.", stats.compiles),
            "generation_tokens": ("New tokens.", stats.new_tokens),
            "engine_steps": ("Steps of the engine.", stats.steps),
            "step_schedule_seconds": ("Seconds of planning steps.", stats.schedule_seconds),
            "step_prepare_seconds": ("Seconds of writing plans.", stats.prepare_seconds),
            "step_dispatch_seconds": ("Seconds of starting programs.", stats.dispatch_seconds),
            "step_device_seconds": ("Seconds of waiting for the device.", stats.device_seconds),
            "step_commit_seconds": ("Seconds of taking in results.", stats.commit_seconds),
        }
        for kind, figures in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in figures.items():
                family = kind(f"{self._prefix}:{name}", text, labels=LABELS)
                family.add_metric(self._labels, value)
                yield family
