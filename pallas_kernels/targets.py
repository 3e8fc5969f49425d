"""Chips for which programs can be compiled without having them: what each can do, and how its compiler is reached.

XLA's TPU compiler comes with `libtpu`, its GPU compiler with the CUDA plugin and `ptxas`; neither needs the hardware.
Both read environment variables when JAX is first imported, so compile in a process of its own:

    subprocess.run([sys.executable, "-c", program], env={**os.environ, **environment(TARGETS["v6e"])})

and there, with `mesh = make_mesh(TARGETS["v6e"], "2x4", {"tp": 8})`, lower under
`jax.sharding.use_abstract_mesh(mesh.abstract_mesh)`, which is what `dispatch.target()` looks at.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax


@dataclass(frozen=True)
class Target:
    """A chip, per JAX device (on TPU7x a device is one of a chip's two cores; on v5p it is both).

    Attributes:
        name: the users' name for it.
        platform: gpu or tpu.
        device_kind: kind that JAX reports.
        topology: the smallest slice or machine that JAX describes; `devices_in_topology`: its number of devices.
        memory_bytes: size of HBM.
        bytes_per_s: published bandwidth of HBM.
        flops: published rate for dense bfloat16.
        scratch_bytes: VMEM of a TensorCore, or shared memory of a streaming multiprocessor.
    """

    name: str
    platform: str
    device_kind: str
    topology: str
    devices_in_topology: int
    memory_bytes: int
    bytes_per_s: float
    flops: float
    scratch_bytes: int


GIB, MIB = 1 << 30, 1 << 20

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("v5e", "tpu", "TPU v5 lite", "1x1", 1, 16 * GIB, 0.819e12, 197e12, 128 * MIB),
        Target("v6e", "tpu", "TPU v6 lite", "1x1", 1, 32 * GIB, 1.64e12, 918e12, 128 * MIB),
        Target("v5p", "tpu", "TPU v5", "2x2x1", 4, 95 * GIB, 2.765e12, 459e12, 64 * MIB),
        Target("tpu7x", "tpu", "TPU7x", "2x2x1", 8, 96 * GIB, 3.69e12, 1154e12, 64 * MIB),
        Target("sm_90", "gpu", "NVIDIA H200", "1x1x1", 1, 150_754_820_096, 4.8e12, 989e12, 232_448),
    )
}

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")
TOPOLOGIES: Mapping[str, tuple[str, ...]] = {
    "v5e": _FLAT,
    "v6e": _FLAT,
    "v5p": _DEEP,
    "tpu7x": ("1x1x1", *_DEEP),
    "sm_90": ("1x1x1",),
}
"""Slices that can be rented, by chips along each axis; the compilers know more."""

_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
_LIBTPU_ARGUMENTS = {"tpu7x": "--xla_tpu_impure_enable_large_2nd_minor_layout=false"}
"""Arguments that libtpu needs when it starts. XLA for TPU7x gives 16-bit arguments tiles of 8 × 128 and wants 16 × 128 for what
a loop slices, so each run would copy all stacked weights first. Tiles of 8 × 128 everywhere cost no cycles by its estimate."""
_TPU7X_ON_PCI = {"vendor": "0x1ae0", "device": "0x0076"}

# Autotuning would run candidates on the device.
_GPU_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}

_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 150754820096
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""


def why_not(target: Target) -> str | None:
    """Says what to install to compile programs for the target; None where they can be compiled here."""
    if target.platform == "tpu":
        return None if importlib.util.find_spec("libtpu") else "the TPU compiler is missing: pip install libtpu"
    missing = [name for name in ("jax_plugins", "jax_cuda13_plugin") if importlib.util.find_spec(name) is None]
    if missing:
        return (
            "the GPU compiler is missing: pip install --no-deps jax-cuda13-plugin==V jax-cuda13-pjrt==V, where V is the "
            "version of jax"
        )
    if ptxas() is None:
        return "the PTX assembler ptxas is missing: pip install nvidia-cuda-nvcc, or install the CUDA 13 toolkit"
    return None


def ptxas() -> Path | None:
    """Finds the PTX assembler: that of the wheel nvidia-cuda-nvcc (which knows the newest PTX), else the one on PATH."""
    wheel = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", "ptxas")
    found = wheel if wheel.is_file() else shutil.which("ptxas")
    return None if found is None else Path(found)


def environment(target: Target) -> dict[str, str]:
    """Returns the variables that a process needs before it imports JAX, beside its own; the default backend is the CPU."""
    if target.platform == "gpu":
        return {"JAX_PLATFORMS": "cpu", **_GPU_ENVIRONMENT}
    return {"JAX_PLATFORMS": "cpu", **_TPU_ENVIRONMENT, "LIBTPU_INIT_ARGS": _LIBTPU_ARGUMENTS.get(target.name, "")}


def prepare_libtpu(pci_devices: Path = Path("/sys/bus/pci/devices")) -> None:
    """Adds to LIBTPU_INIT_ARGS, on a machine with TPU7x chips, what `environment` has there; what users set stays, and
    an empty value means that nothing is to be added.

    libtpu reads the variable when JAX first looks for devices: call this before.
    """

    def is_tpu7x(device: Path) -> bool:
        try:
            return all((device / name).read_bytes().strip() == value.encode() for name, value in _TPU7X_ON_PCI.items())
        except OSError:
            return False

    needed, given = _LIBTPU_ARGUMENTS["tpu7x"], os.environ.get("LIBTPU_INIT_ARGS")
    if given is not None and (not given or needed.partition("=")[0] in given):
        return
    if any(map(is_tpu7x, pci_devices.glob("*"))):
        os.environ["LIBTPU_INIT_ARGS"] = f"{given or ''} {needed}".strip()


def devices(target: Target, topology: str | None = None) -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
    """Returns the devices of a slice, such as "2x4" (by default the smallest); they compile and cannot run.

    Raises:
        ValueError: the compiler does not know this topology.
    """
    from jax.experimental import topologies

    options: dict[str, Any] = {"topology_name": f"{target.name}:{topology or target.topology}"}
    if (topology or target.topology) == "1x1":  # older compilers know whole hosts only unless told
        options["chips_per_host_bounds"] = (1, 1, 1)
    if target.platform == "gpu":
        options = {"target_config": _H200, "topology": topology or target.topology}
    try:
        description = topologies.get_topology_desc(platform="cuda" if target.platform == "gpu" else "tpu", **options)
    except Exception as error:  # the compilers raise errors of various types
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{target.name} has no topology {topology!r} ({reason}): the nearest is {nearest_topology(target, topology)!r}"
        ) from None
    return list(description.devices)


def nearest_topology(target: Target, topology: str | None) -> str:
    """Returns the slice with about as many chips as `topology` names, the larger of two; the smallest where it is no product."""
    sizes = {name: math.prod(map(int, name.split("x"))) for name in TOPOLOGIES[target.name]}
    parts = (topology or "").split("x")
    wanted = math.prod(map(int, parts)) if all(part.isdecimal() for part in parts) else 0
    return min(sizes, key=lambda name: (abs(sizes[name] - wanted), -sizes[name]))


def make_mesh(target: Target, topology: str | None = None, axes: Mapping[str, int] | None = None) -> jax.sharding.Mesh:
    """Makes a mesh over the first devices of a slice; by default one device on the axis "x".

    Raises:
        ValueError: the compiler does not know this topology, or it has fewer devices than the mesh.
    """
    import jax
    import numpy as np

    axes = axes or {"x": 1}
    found, wanted = devices(target, topology), math.prod(axes.values())
    if wanted > len(found):
        raise ValueError(
            f"the mesh {dict(axes)} needs {wanted} devices, {target.name} {topology or target.topology} has "
            f"{len(found)}: choose a larger topology"
        )
    return jax.sharding.Mesh(np.array(found[:wanted]).reshape(tuple(axes.values())), tuple(axes))
