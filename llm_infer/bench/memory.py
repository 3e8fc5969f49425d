"""`llm-infer bench memory`: measures what decoding at batch 1 takes beyond a process that has only imported the packages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from llm_infer.base.errors import UserError

STATUS = Path("/proc/self/status")


def run(model: str, pool_bytes: int, precision: str, json_file: str | None) -> None:
    """Measures in a process of its own and prints megabytes.

    Raises:
        UserError: this system does not tell how much a process takes, or the measurement failed.
    """
    if not STATUS.exists():
        raise UserError("bench memory reads /proc, which this system does not have: run it on Linux")
    command = [sys.executable, "-m", "llm_infer.bench.memory", model, str(pool_bytes), precision]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the measurement ended with exit code {done.returncode}: {reason}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"imports {found['imported'] / 1e6:.0f} MB, decoding at batch 1 {found['decoding'] / 1e6:.0f} MB: "
        f"{(found['decoding'] - found['imported']) / 1e6:.0f} MB more\n"
        f"of these weights {found['weights'] / 1e6:.0f} MB, page pool {found['pool'] / 1e6:.0f} MB; "
        f"most at any time, compiling included: {(found['peak'] - found['imported']) / 1e6:.0f} MB more than imports"
    )
    if json_file:
        Path(json_file).write_text(json.dumps({"model": model, "precision": precision, **found}, indent=2) + "\n")


def _resident(what: str) -> int:
    """Returns VmRSS or VmHWM (the most so far) of this process in bytes."""
    return int(re.search(rf"{what}:\s+(\d+)", STATUS.read_text())[1]) * 1024  # type: ignore[index]


def main(model: str, pool_bytes: str, precision: str) -> None:
    """Measures this process and prints a JSON line on stdout."""
    import jax.numpy as jnp

    from llm_infer.decoding.sampling_params import SamplingParams
    from llm_infer.llm import LLM
    from pallas_kernels import cpu_ffi

    if cpu_ffi.why_not() is None:
        from pallas_kernels.cpu_ffi.threads import thread_pool

        thread_pool()
    jnp.zeros(2).block_until_ready()
    found = {"imported": _resident("VmRSS")}
    llm = LLM(model, max_num_seqs=1, kv_cache_memory=int(pool_bytes), precision=precision, progress=False)
    llm.generate(["A boat leaves the harbour at noon and"], SamplingParams(max_tokens=48, temperature=0.0))
    found |= {"decoding": _resident("VmRSS"), "peak": _resident("VmHWM")}
    params = llm.engine.runner.model.params.values()
    found |= {
        "weights": sum(value.nbytes for value in params),
        "pool": sum(pool.nbytes for pool in llm.engine.runner.state.cache.values()),
    }
    print(json.dumps({**found, "processors": os.cpu_count()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
