"""Measures OpenVINO GenAI on the CPU, with its default precision for the device."""

import itertools
import statistics
import sys

import openvino_genai  # pyright: ignore[reportMissingImports]
from reporting import numbers, report_all  # pyright: ignore[reportMissingImports]

SENTENCE = (
    "A boat leaves the harbour at noon and comes back with the tide, full of nets, ropes and a little silver fish. "
)
STEPS = 48


def main(path: str, threads: int, depths: list[int]) -> None:
    pipeline = openvino_genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)
    config = openvino_genai.GenerationConfig()
    config.ignore_eos = True
    twenty = pipeline.get_tokenizer().encode(SENTENCE * 20).input_ids.shape[1]
    serial = itertools.count()

    def measure(size: int, length: int, new_tokens: int):
        """Returns the metrics of one batch; no two prompts begin alike, so no cached prefix helps."""
        config.max_new_tokens = new_tokens
        text = SENTENCE * round(20 * length / twenty)
        return pipeline.generate([f"p{next(serial)} {text}" for _ in range(size)], config).perf_metrics

    def prefill(length: int) -> float:
        runs = [measure(1, length, 1) for _ in range(4)]
        return max(1000 * run.get_num_input_tokens() / run.get_ttft().mean for run in runs[1:])

    def decode(size: int, length: int) -> float:
        raw = measure(size, length, STEPS).raw_metrics
        # There is a time for each step of the batch, in ms; `get_tpot` is already divided by the batch size.
        ends, sizes = raw.m_new_token_times, raw.m_batch_sizes
        pairs = zip(itertools.pairwise(ends), sizes[1:], strict=True)
        return size * 1000 / statistics.median(after - before for (before, after), n in pairs if n == size)

    report_all(openvino_genai.__version__, "its default for a CPU", prefill, decode, depths)


main(sys.argv[1], int(sys.argv[2]), numbers(sys.argv[3]))
