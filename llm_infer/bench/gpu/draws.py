"""Section of the GPU run: draws tokens with each kind of limit, by the kernel and by XLA, for whose loops the host waits."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import numpy as np

from llm_infer.bench.gpu.section import Row, Setting, seconds_per_call
from pallas_kernels import dispatch
from pallas_kernels.draw_tokens.cases import make_limits, random_limits, random_logits

LIMITS = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top-p": {"top_p": 0.9},
    "top-k": {"top_k": 40},
    "top-k and top-p": {"top_k": 20, "top_p": 0.95},
    "min-p": {"min_p": 0.05},
    "typical-p": {"typical_p": 0.9},
    "flat, top-p": {"temperature": 3.0, "top_p": 0.95},
}
MAX_THAT_DIFFER = 0.01
"""Share of rows whose token may differ: sums in another order can move a threshold, or a draw between two tokens."""


def draws(setting: Setting) -> Iterator[Row]:
    """Checks that the kernel draws what XLA draws, and times both, on logits of Llama 3's vocabulary, as steep as a model's."""
    rows, vocab = (16, 300) if setting.small else (64, 128_256)
    rng = np.random.default_rng(0)
    options = {"interpret": True} if setting.interpret else {}
    programs = {
        "gpu_triton": jax.jit(functools.partial(dispatch.implementation("draw_tokens", "gpu_triton"), **options)),
        "xla": jax.jit(dispatch.implementation("draw_tokens", "xla")),
    }
    uniform = rng.random(rows, np.float32)
    arguments = random_logits(rng, rows, vocab), random_limits(rng, rows, vocab), uniform
    found, expected = (np.asarray(program(*arguments)) for program in programs.values())
    differ = float(np.mean(found != expected))
    limit = MAX_THAT_DIFFER + 1 / rows
    yield {"case": "all kinds", "implementation": "gpu_triton", "ok": differ <= limit, "differ": differ}
    steep = np.tile(-1.5 * np.log(np.arange(1, vocab + 1, dtype=np.float32)), (rows, 1))
    logits = jax.device_put(rng.permuted(steep, axis=1))
    for name, limits in LIMITS.items():
        arguments = logits, *jax.device_put((make_limits(rows, **limits), uniform))
        for implementation, program in programs.items():
            call = functools.partial(program, *arguments)
            seconds = seconds_per_call(call, rounds=1 if setting.small else 5)
            yield {"case": name, "implementation": implementation, "µs": 1e6 * seconds}
