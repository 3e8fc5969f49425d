"""Measures Hugging Face transformers on torch, bfloat16 weights and activations."""

import statistics
import sys
import time
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from reporting import numbers, report_all  # pyright: ignore[reportMissingImports]

CHUNK = 512
STEPS = 24


@torch.inference_mode()
def main(path: Path, threads: int, depths: list[int]) -> None:
    torch.set_num_threads(threads)
    where, file = (path, None) if path.is_dir() else (path.parent, path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.bfloat16)
    model.eval()

    def prompt(size: int, length: int):
        first, *rest = torch.randint(10, 1000, (size, length)).split(CHUNK, dim=1)
        out = model(first, use_cache=True, logits_to_keep=1)
        for ids in rest:
            out = model(ids, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        return out

    def prefill(length: int) -> float:
        times = []
        for _ in range(3):
            started = time.perf_counter()
            prompt(1, length)
            times.append(time.perf_counter() - started)
        return length / min(times)

    def decode(size: int, length: int) -> float:
        out, times = prompt(size, length), []
        for _ in range(STEPS):
            token = out.logits[:, -1:].argmax(-1)
            started = time.perf_counter()
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            times.append(time.perf_counter() - started)
        return size / statistics.median(times)

    report_all(transformers.__version__, "weights, products and cache in bfloat16", prefill, decode, depths)


main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), numbers(sys.argv[3]))
