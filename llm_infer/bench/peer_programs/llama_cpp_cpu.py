"""Measures llama.cpp through llama-cpp-python's low-level interface."""

import ctypes
import json
import sys
import time

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np

STEPS = 48


def main(path: str, threads: int) -> None:
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    batch = llama_cpp.llama_batch_init(512, 0, 32)
    rng = np.random.default_rng(0)

    def context(length: int, sequences: int):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = length, sequences
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        if hasattr(params, "kv_unified"):
            params.kv_unified = True
        return llama_cpp.llama_init_from_model(model, params)

    def step(ctx, rows: list[tuple[int, int, bool]]) -> float:
        """Returns the seconds for one batch of (position, sequence, wants logits)."""
        batch.n_tokens = len(rows)
        for i, (position, sequence, logits) in enumerate(rows):
            batch.token[i], batch.pos[i] = int(rng.integers(10, 1000)), position
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, sequence, logits
        started = time.perf_counter()
        if llama_cpp.llama_decode(ctx, batch) != 0:
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_synchronize(ctx)
        return time.perf_counter() - started

    def report(metric: str, value: float) -> None:
        print(json.dumps({"metric": metric, "value": value, "version": llama_cpp.__version__}), flush=True)

    def prompt(length: int, sequence: int) -> list[tuple[int, int, bool]]:
        return [(i, sequence, i == length - 1) for i in range(length)]

    ctx = context(1024, 1)
    times = []
    for _ in range(3):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
        times.append(step(ctx, prompt(512, 0)))
    report("prefill_512", 512 / min(times))
    llama_cpp.llama_free(ctx)
    for size in (1, 8, 32):
        ctx = context((128 + STEPS) * size + 64, size)
        for sequence in range(size):
            step(ctx, prompt(128, sequence))
        times = [step(ctx, [(128 + i, sequence, True) for sequence in range(size)]) for i in range(STEPS)]
        report(f"decode_b{size}", size / float(np.median(times)))
        llama_cpp.llama_free(ctx)


main(sys.argv[1], int(sys.argv[2]))
