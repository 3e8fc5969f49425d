"""Compiles LLVM IR for this host, keeps the machine code on disk and loads it into the process (llvmlite; no C toolchain).

A compiled kernel is an object file under the cache directory. Its key is a hash of the sources that wrote the IR, the
kernel's parameters, the CPU's features and the llvmlite version, so a warm start neither builds IR nor runs LLVM.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
from llvmlite import ir

from pallas_kernels.cache_folder import cache_folder
from pallas_kernels.cpu_ffi.once import once

CACHE_VARIABLE = "LLM_INFER_CPU_CACHE_DIR"
SPLIT_AVX_CPUS = ("znver1", "bdver1", "bdver2", "bdver3", "bdver4", "btver2")  # LLVM's names; 128-bit units under AVX


@dataclass(frozen=True)
class Target:
    """A CPU for which code is made.

    `lanes`: float32 per vector register, `registers`: how many registers there are, `unit_lanes`: float32 that one
    execution unit takes at a time (Zen 1 splits its 256-bit instructions in two). They only steer speed.
    """

    triple: str
    cpu: str
    features: str
    lanes: int
    registers: int
    unit_lanes: int

    def has(self, feature: str) -> bool:
        return f"+{feature}" in self.features.split(",")

    @property
    def register_bytes(self) -> int:
        """The size of the widest vector register, whatever `lanes` is."""
        return 64 if self.has("avx512f") else 32 if self.has("avx2") else 16


@once
def host_target() -> Target:
    """Returns the machine on which this process runs. AVX-512 is used where the CPU has it (BW, VL and DQ included)."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    flags = llvm.get_host_cpu_features()
    if all(flags.get(name) for name in ("avx512f", "avx512bw", "avx512vl", "avx512dq")):
        lanes, registers = 16, 32
    elif flags.get("avx2") and flags.get("fma"):
        lanes, registers = 8, 16
    else:  # NEON, SSE, or whatever LLVM knows: four lanes are native or cheap to split everywhere
        lanes, registers = 4, 32 if "aarch64" in llvm.get_process_triple() else 16
    cpu = llvm.get_host_cpu_name()
    if flags.get("amx-tile") and not _may_use_amx():
        for name in flags:
            flags[name] &= not name.startswith("amx")
    unit_lanes = 4 if cpu in SPLIT_AVX_CPUS else lanes
    return Target(llvm.get_process_triple(), cpu, flags.flatten(), lanes, registers, unit_lanes)


def _may_use_amx() -> bool:
    """Asks Linux to let this process use the registers of AMX, which it keeps only for those that do."""
    if not sys.platform.startswith("linux"):
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


@once
def _target_machine(target: Target) -> llvm.TargetMachine:
    # Code and constants are loaded wherever the process has room. On x86 nothing keeps them within the 2 GB of the small
    # model, and LLVM ends the process where they lie outside; on other CPUs llvmlite reserves one piece for both.
    reloc, codemodel = ("static", "large") if target.triple.startswith("x86_64") else ("pic", "small")
    machine = llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, reloc=reloc, codemodel=codemodel, jit=True
    )
    machine.set_asm_verbosity(True)
    return machine


def optimise(module: ir.Module, target: Target) -> llvm.ModuleRef:
    """Verifies the module and runs LLVM's O2 pipeline without its vectorisers: the vectors are explicit already."""
    module.triple = target.triple
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = llvm.create_pass_builder(_target_machine(target), options)
    builder.getModulePassManager().run(parsed, builder)
    return parsed


def emit_object(module: ir.Module, target: Target) -> bytes:
    return _target_machine(target).emit_object(optimise(module, target))


def emit_assembly(module: ir.Module, target: Target) -> str:
    """Returns the machine code as text, for reading what a kernel became."""
    return _target_machine(target).emit_assembly(optimise(module, target))


def cache_directory() -> Path:
    """Returns the folder of object files: $LLM_INFER_CPU_CACHE_DIR, else cpu_kernels in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else cache_folder() / "cpu_kernels"


@once
def _source_hash(paths: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def _cached_object(name: str, sources: tuple[str, ...], target: Target, build: Callable[[], ir.Module]) -> bytes:
    """Returns a kernel's object file from the cache, or builds it and puts it there. A damaged file is built again."""
    own = sorted(str(p) for p in Path(__file__).parent.glob("*.py"))
    parts = (name, _source_hash((*own, *sources)), target.triple, target.cpu, target.features, llvmlite.__version__)
    path = cache_directory() / f"{name}-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:24]}.o"
    if path.is_file():
        stored = path.read_bytes()
        digest, code = stored[:32], stored[32:]
        if hashlib.sha256(code).digest() == digest:
            return code
    code = emit_object(build(), target)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(hashlib.sha256(code).digest() + code)
    os.replace(file.name, path)
    return code


def load(
    name: str,
    sources: tuple[str, ...],
    build: Callable[[], ir.Module],
    exports: Sequence[str],
    symbols: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Compiles (or fetches) and loads a module; returns the addresses of the functions in `exports`.

    The code is never unloaded: XLA and sleeping threads hold addresses in it until the very end of the process.

    Args:
        name: file-name-safe name that includes every parameter of the kernel.
        sources: files, besides this package's own, that determine the IR.
        build: writes the module; only called when the cache has nothing.
        exports: names of functions that the module defines.
        symbols: addresses of the functions that the module declares and does not define (those of the C library are found).
    """
    target = host_target()
    code = _cached_object(name, sources, target, build)
    for symbol, address in (symbols or {}).items():
        llvm.add_symbol(symbol, address)
    empty = llvm.parse_assembly(f'target triple = "{target.triple}"')
    engine = llvm.create_mcjit_compiler(empty, _target_machine(target))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    addresses = {symbol: engine.get_function_address(symbol) for symbol in exports}
    engine.detach()
    if missing := [symbol for symbol, address in addresses.items() if not address]:
        raise KeyError(f"compiled module {name} has no function {missing}")
    return addresses
