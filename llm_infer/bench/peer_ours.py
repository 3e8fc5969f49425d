"""Measures this engine like the programs of its peers: `python -m llm_infer.bench.peer_ours GGUF THREADS PRECISION`."""

from __future__ import annotations

import json
import os
import sys


def main(path: str, threads: str, precision: str) -> None:
    os.environ["LLM_INFER_NUM_THREADS"] = threads
    import jax
    import numpy as np

    from llm_infer.bench.rates import measure
    from llm_infer.llm import LLM

    llm = LLM(path, precision=precision, max_model_len=520, enable_prefix_caching=False, progress=False)
    rng = np.random.default_rng(0)

    def report(metric: str, value: float) -> None:
        print(json.dumps({"metric": metric, "value": value, "version": f"jax {jax.__version__}"}), flush=True)

    list(llm.engine.warm_up([1, 8, 32, 512]))
    report("prefill_512", max(measure(llm.engine, rng, 1, 512, 1)["prefill_tok_s"] for _ in range(3)))
    for size in (1, 8, 32):
        report(f"decode_b{size}", measure(llm.engine, rng, size, 128, 48)["decode_tok_s"])


if __name__ == "__main__":
    main(*sys.argv[1:])
