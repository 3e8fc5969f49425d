"""Native CPU kernels for XLA in pure Python: IR written with `emit`, compiled and cached by `compile`, called by `bridge`.

Import the submodules where a kernel is built: this file needs neither llvmlite nor jax.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
from functools import cache


@cache
def why_not() -> str | None:
    """Says why native kernels cannot run in this process; None where they can."""
    if importlib.util.find_spec("llvmlite") is None:
        return "needs the package llvmlite, which is not installed"
    if sys.platform not in ("linux", "darwin"):
        return f"needs POSIX threads, found {sys.platform}"
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return None
    if machine not in ("x86_64", "amd64"):
        return f"is made for x86-64 and arm64, found {machine}"
    from pallas_kernels.cpu_ffi.compile import host_target

    missing = [name for name in ("avx2", "fma", "f16c") if not host_target().has(name)]
    return f"needs a CPU with {', '.join(missing)}" if missing else None
