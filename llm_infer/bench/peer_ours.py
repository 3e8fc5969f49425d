"""Measures this engine like the programs of its peers: `python -m llm_infer.bench.peer_ours MODEL THREADS DEPTHS PRECISION`."""

from __future__ import annotations

import gc
import os
import sys

STEPS = 48


def main(path: str, threads: str, depths: str, precision: str) -> None:
    os.environ["LLM_INFER_NUM_THREADS"] = threads
    import jax
    import numpy as np

    from llm_infer import __version__
    from llm_infer.bench.peer_programs.reporting import PREFILL, PROMPT, SIZES, numbers, report_all
    from llm_infer.bench.rates import measure
    from llm_infer.engine.engine import Engine
    from llm_infer.engine.step.state import PAGES
    from llm_infer.llm import LLM

    rng = np.random.default_rng(0)
    usual = max(PREFILL, PROMPT + STEPS) + 8
    engines: list[Engine] = []

    def engine_for(length: int) -> Engine:
        """Returns an engine whose sequences hold so many tokens; there is one at a time, as a model may fill the memory."""
        if not engines or engines[0].max_model_len < length:
            engines.clear()
            gc.collect()
            llm = LLM(path, precision=precision, max_model_len=length, enable_prefix_caching=False, progress=False)
            list(llm.engine.warm_up([*SIZES, PREFILL]))
            engines.append(llm.engine)
        return engines[0]

    def prefill(length: int) -> float:
        engine = engine_for(usual)
        return max(measure(engine, rng, 1, length, 1)["prefill_tok_s"] for _ in range(3))

    def decode(size: int, length: int) -> float:
        if length > context:
            raise RuntimeError(f"the model's context is {context} tokens")
        length = min(length, context - STEPS)  # at a depth of the whole context, the steps end there
        found = measure(engine_for(max(usual, length + STEPS)), rng, size, length, STEPS)["decode_tok_s"]
        if found is None:
            raise RuntimeError("too few steps held all sequences")
        return found

    engine = engine_for(usual)
    context = engine.runner.model.config.max_position_embeddings
    pages = engine.config.cache.dtype or engine.runner.state.cache[PAGES].dtype
    about = f"--precision {precision}, weights as in the file, cache in {pages}"
    del engine
    report_all(f"{__version__} (jax {jax.__version__})", about, prefill, decode, numbers(depths))


if __name__ == "__main__":
    main(*sys.argv[1:])
