"""Measures OpenVINO GenAI on the CPU, with its default precision for the device."""

import json
import statistics
import sys
from itertools import pairwise

import openvino_genai  # pyright: ignore[reportMissingImports]

SENTENCE = (
    "A boat leaves the harbour at noon and comes back with the tide, full of nets, ropes and a little silver fish. "
)


def main(path: str, threads: int) -> None:
    pipeline = openvino_genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)
    config = openvino_genai.GenerationConfig()
    config.ignore_eos = True

    def measure(size: int, sentences: int, new_tokens: int, tag: str):
        """Returns the metrics of one batch; no two prompts begin alike, so no cached prefix helps."""
        config.max_new_tokens = new_tokens
        return pipeline.generate([f"{tag}{i} {SENTENCE * sentences}" for i in range(size)], config).perf_metrics

    def report(metric: str, value: float) -> None:
        print(json.dumps({"metric": metric, "value": value, "version": openvino_genai.__version__}), flush=True)

    rates = []
    for run in range(4):
        metrics = measure(1, 20, 1, f"p{run}")
        rates.append(1000 * metrics.get_num_input_tokens() / metrics.get_ttft().mean)
    report("prefill_512", max(rates[1:]))
    for size in (1, 8, 32):
        raw = measure(size, 5, 48, f"d{size}-").raw_metrics
        # There is a time for each step of the batch, in ms; `get_tpot` is already divided by the batch size.
        ends, sizes = raw.m_new_token_times, raw.m_batch_sizes
        steps = [after - before for (before, after), n in zip(pairwise(ends), sizes[1:], strict=True) if n == size]
        report(f"decode_b{size}", size * 1000 / statistics.median(steps))


main(sys.argv[1], int(sys.argv[2]))
