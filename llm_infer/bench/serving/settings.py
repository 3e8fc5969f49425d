"""What is asked of `llm-infer bench serving`, checked when it is made, before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_infer.base.errors import UserError
from llm_infer.base.files import parsed_json
from llm_infer.bench.serving.datasets import Lengths
from llm_infer.bench.serving.figures import METRICS
from llm_infer.bench.serving.load import Arrivals

BACKENDS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
DATASETS = ("random", "prefix_repetition", "sharegpt", "spec_bench", "timed_trace")


@dataclass(frozen=True)
class Settings:
    """All settings of a load.

    Attributes:
        base_url: the server's address.
        backend: "openai" (completions) or "openai-chat".
        endpoint: path of requests; None goes by the backend.
        model: name; None takes the server's first.
        api_key: sent as a bearer token.
        dataset: one of DATASETS.
        path: its file.
        num_prompts: conversations to send; None sends a whole trace, or 100.
        lengths: of random requests.
        prefixes, prefix, suffix: of the data set prefix_repetition: number and length of prefixes, length of what follows.
        max_input, max_output: most tokens of prompts of a trace, and of answers of a file.
        arrivals: when requests come, if no trace says it.
        trace_scale: a trace is played so many times as fast.
        max_concurrency: most conversations at once.
        warmups: requests before the load, which no figure has.
        ready_seconds: how long to wait for the server.
        timeout: seconds for one request.
        stream: whether answers are streamed.
        fields: further fields of each body.
        seed: of prompts and arrivals.
        metrics, percentiles, goodput: see `figures`.
    """

    base_url: str = "http://127.0.0.1:8000"
    backend: str = "openai"
    endpoint: str | None = None
    model: str | None = None
    api_key: str | None = None
    dataset: str = "random"
    path: str | None = None
    num_prompts: int | None = None
    lengths: Lengths = field(default_factory=Lengths)
    prefixes: int = 10
    prefix: int = 256
    suffix: int = 256
    max_input: int | None = None
    max_output: int | None = None
    arrivals: Arrivals = field(default_factory=Arrivals)
    trace_scale: float = 1.0
    max_concurrency: int | None = None
    warmups: int = 0
    ready_seconds: float = 0.0
    timeout: float = 3600.0
    stream: bool = True
    fields: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    metrics: tuple[str, ...] = tuple(METRICS)
    percentiles: tuple[float, ...] = (50.0, 90.0, 99.0)
    goodput: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("--backend", self.backend, tuple(BACKENDS))
        _one_of("--dataset-name", self.dataset, DATASETS)
        if self.dataset in ("sharegpt", "spec_bench", "timed_trace") and self.path is None:
            raise UserError(f"--dataset-name {self.dataset} needs the file: --dataset-path FILE")
        if not (self.url_path.isascii() and self.url_path.isprintable()) or " " in self.url_path:
            raise UserError(f"--endpoint {self.endpoint}: expected a path such as /v1/completions")
        if not 0 <= self.lengths.range_ratio <= 1:
            raise UserError(f"--random-range-ratio {self.lengths.range_ratio:g}: expected 0 to 1")
        arrivals = self.arrivals
        for flag, value in (
            ("--request-rate", arrivals.rate),
            ("--burstiness", arrivals.burstiness),
            ("--trace-scale", self.trace_scale),
            ("--request-timeout", self.timeout),
        ):
            if not value > 0:
                raise UserError(f"{flag} {value:g}: expected a number above 0")
        if math.isinf(self.trace_scale):
            raise UserError("--trace-scale inf: expected a finite number")
        if arrivals.ramp is not None:
            _one_of("--ramp-up-strategy", arrivals.ramp, ("linear", "exponential"))
            if not (0 < arrivals.ramp_start < math.inf and 0 < arrivals.ramp_end < math.inf):
                raise UserError("--ramp-up-strategy needs two rates above 0: --ramp-up-start-rps X --ramp-up-end-rps X")
            if not math.isinf(arrivals.rate):
                raise UserError("--ramp-up-strategy and --request-rate both set the rate: give one of them")

    @property
    def chat(self) -> bool:
        """Whether messages are sent."""
        return self.backend == "openai-chat"

    @property
    def url_path(self) -> str:
        """The path of requests."""
        return "/" + (self.endpoint or BACKENDS[self.backend]).lstrip("/")


def _one_of(flag: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{flag} {value}: expected {', '.join(choices[:-1])} or {choices[-1]}")


def read_metrics(text: str) -> tuple[str, ...]:
    """Returns the names of metrics in a text such as "ttft,itl"."""
    names = tuple(each.strip() for each in text.split(",") if each.strip())
    for name in names:
        _one_of("--percentile-metrics", name, tuple(METRICS))
    return names


def read_percentiles(text: str) -> tuple[float, ...]:
    """Returns the percentiles in a text such as "50,99.9"."""
    try:
        found = tuple(float(each) for each in text.split(",") if each.strip())
    except ValueError:
        found = (-1.0,)
    if not all(0 <= each <= 100 for each in found):
        raise UserError(f"--metric-percentiles {text}: expected numbers from 0 to 100 such as 50,90,99")
    return found


def read_goodput(texts: Sequence[str]) -> dict[str, float]:
    """Returns the limits in texts such as "ttft:200", in milliseconds; one text may hold several, apart by spaces or commas."""
    found = {}
    for text in " ".join(texts).replace(",", " ").split():
        name, _, limit = text.partition(":")
        try:
            found[name] = float(limit)
        except ValueError:
            found[name] = -1.0
        if name not in ("ttft", "tpot", "e2el") or not 0 <= found[name] < math.inf:
            raise UserError(f"--goodput {text}: expected ttft, tpot or e2el with milliseconds, such as ttft:200")
    return found


def read_fields(text: str | None) -> dict[str, Any]:
    """Returns the JSON object of --extra-body."""
    found = {} if text is None else parsed_json(text, "--extra-body")
    if not isinstance(found, dict):
        raise UserError(f"--extra-body {text}: expected a JSON object such as '{{\"top_p\": 0.9}}'")
    return found
