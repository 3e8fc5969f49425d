"""Measures ik_llama.cpp through ik-llama-cpp-python's low-level interface."""

import sys

import ik_llama_cpp  # pyright: ignore[reportMissingImports]
import llama_batches  # pyright: ignore[reportMissingImports]
from ik_llama_cpp import _ctypes_api as api  # pyright: ignore[reportMissingImports]
from ik_llama_cpp._internals import IkContext, IkModel  # pyright: ignore[reportMissingImports]
from reporting import numbers  # pyright: ignore[reportMissingImports]


def main(path: str, threads: int, depths: list[int]) -> None:
    model = IkModel(path)

    def open_context(length: int, sequences: int) -> IkContext:
        return IkContext(model, n_ctx=length, n_threads=threads, flash_attn=True, n_seq_max=sequences)

    def compute(context: IkContext, batch) -> int:
        status = context.decode(batch)
        if status == 0 and batch.logits[batch.n_tokens - 1]:
            context.get_logits(batch.n_tokens - 1)  # waits for the end
        return status

    batch = api.llama_batch_init(llama_batches.CHUNK, 0, 1)
    llama_batches.measure(
        ik_llama_cpp.__version__, batch, open_context, compute, IkContext.kv_cache_clear, IkContext.close, depths
    )


main(sys.argv[1], int(sys.argv[2]), numbers(sys.argv[3]))
