"""Environment report: versions, devices, memory, caches and what is missing for full speed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from glob import glob
from pathlib import Path

from llm_infer.base import accelerators
from llm_infer.base.environment import cache_dir, offline_variable
from llm_infer.base.errors import UserError
from llm_infer.commands.user_file import VARIABLE, standard_place, user_defaults, user_file
from llm_infer.engine.compile_cache import cache_directory
from llm_infer.weights.default_model import DEFAULT_MODEL, find
from pallas_kernels import tuned

PACKAGES = (
    *("llm-infer", "jax", "jaxlib", "flax", "orbax-checkpoint", "llvmlite", "llguidance", "gguf", "tokenizers"),
    *("safetensors", "numpy"),
)


def report() -> str:
    """Returns the report as text, one fact a line."""
    return "\n".join(f"{name:<18}{value}" for name, value in _facts())


def _facts() -> list[tuple[str, str]]:
    import jax

    devices = jax.devices()
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    model = find(DEFAULT_MODEL)
    compiled = cache_directory()
    facts = [
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *((name, _version(name)) for name in PACKAGES),
        ("devices", f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform})"),
        ("drivers", _drivers()),
        ("cpu", f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores usable, vector units: {_vector_units()}"),
        ("cpu kernels", _cpu_kernels()),
        ("memory", f"{gib:.1f} GiB"),
        ("cache directory", str(cache_dir())),
        ("user's defaults", _user_file()),
        ("default model", f"{DEFAULT_MODEL.name}: {model if model else 'not fetched yet (first use fetches it)'}"),
        ("compiled programs", _directory_size(compiled) if compiled else "not kept (LLM_INFER_COMPILE_CACHE=0)"),
        ("tuned kernels", _directory_size(tuned.user_directory())),
        (
            "network",
            f"not used ({offline_variable()})" if offline_variable() else "used for models that are not here yet",
        ),
    ]
    return facts


def _user_file() -> str:
    try:
        if (path := user_file()) is not None:
            user_defaults()
            return str(path)
    except UserError as error:
        return f"cannot be used: {error}"
    return f"none ({VARIABLE} is empty)" if VARIABLE in os.environ else f"none (would be in {standard_place()})"


def _drivers() -> str:
    """Says which drivers of accelerators there are, and which libraries JAX lacks to see them."""
    found = [file for pattern in accelerators.DEVICE_FILES for file in sorted(glob(pattern))]
    if not found:
        return "no GPU or TPU (none of the files that their drivers make)"
    libraries = {"libtpu": "tpu", "jax-cuda13-plugin": "cuda13"}
    missing = [f"{name} (extra {extra})" for name, extra in libraries.items() if _version(name) == "not installed"]
    return f"{', '.join(found[:4])}; not installed: {', '.join(missing) or 'nothing'}"


def _cpu_kernels() -> str:
    from pallas_kernels import cpu_ffi

    if reason := cpu_ffi.why_not():
        return f"not usable, XLA serves: {reason}"
    from pallas_kernels.cpu_ffi.compile import cache_directory
    from pallas_kernels.cpu_ffi.threads import THREADS_VARIABLE, default_threads

    return f"native, {default_threads()} threads ({THREADS_VARIABLE}), {_directory_size(cache_directory())}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _directory_size(path: Path) -> str:
    sizes = [file.stat().st_size for file in path.glob("*") if file.is_file()] if path.is_dir() else []
    return f"{path} ({len(sizes)} files, {sum(sizes) / 1e6:.1f} MB)"


def _cpu_info() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _cpu_name() -> str:
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


def _vector_units() -> str:
    flags = set((_cpu_info().get("flags") or _cpu_info().get("Features") or "").split())
    known = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "neon", "asimd", "sve")
    return ", ".join(flag for flag in known if flag in flags) or "unknown"
