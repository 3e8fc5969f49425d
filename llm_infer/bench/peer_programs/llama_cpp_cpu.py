"""Measures llama.cpp through llama-cpp-python's low-level interface."""

import ctypes
import sys

import llama_batches  # pyright: ignore[reportMissingImports]
import llama_cpp  # pyright: ignore[reportMissingImports]
from reporting import numbers  # pyright: ignore[reportMissingImports]


def main(path: str, threads: int, depths: list[int]) -> None:
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit("llama.cpp does not load this file")

    def open_context(length: int, sequences: int):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = length, sequences
        params.n_batch = params.n_ubatch = llama_batches.CHUNK
        params.n_threads = params.n_threads_batch = threads
        if hasattr(params, "kv_unified"):
            params.kv_unified = True
        context = llama_cpp.llama_init_from_model(model, params)
        if not context:
            raise RuntimeError(f"no context of {length} tokens could be made")
        return context

    def compute(context, batch) -> int:
        status = llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_synchronize(context)
        return status

    def clear(context) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)

    batch = llama_cpp.llama_batch_init(llama_batches.CHUNK, 0, 1)
    llama_batches.measure(llama_cpp.__version__, batch, open_context, compute, clear, llama_cpp.llama_free, depths)


main(sys.argv[1], int(sys.argv[2]), numbers(sys.argv[3]))
