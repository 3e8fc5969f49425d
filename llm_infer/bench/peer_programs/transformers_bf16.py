"""Measures Hugging Face transformers on torch, bfloat16 weights and activations."""

import json
import statistics
import sys
import time
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

STEPS = 24


@torch.inference_mode()
def main(path: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    model.eval()

    def report(metric: str, value: float) -> None:
        print(json.dumps({"metric": metric, "value": value, "version": transformers.__version__}), flush=True)

    ids, times = torch.randint(10, 1000, (1, 512)), []
    for _ in range(3):
        started = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        times.append(time.perf_counter() - started)
    report("prefill_512", 512 / min(times))
    for size in (1, 8, 32):
        out = model(torch.randint(10, 1000, (size, 128)), use_cache=True, logits_to_keep=1)
        times = []
        for _ in range(STEPS):
            token = out.logits[:, -1:].argmax(-1)
            started = time.perf_counter()
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            times.append(time.perf_counter() - started)
        report(f"decode_b{size}", size / statistics.median(times))


main(Path(sys.argv[1]).resolve(), int(sys.argv[2]))
