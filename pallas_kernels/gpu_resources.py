"""Reads from XLA's dump, without a GPU, what a kernel takes of a multiprocessor: registers, spills, shared memory.

In the process that compiles (see `targets`), add `dump_flags(folder)` to XLA_FLAGS; after it, `read_dump(folder)`. Mosaic GPU
kernels never reach XLA as PTX: for them, give the process `mosaic_variables(folder)` and read the result with `read_mosaic_dump`.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pallas_kernels.targets import ptxas

REGISTERS, SHARED_BYTES, THREADS, BLOCKS = 65536, 233_472, 2048, 32
"""Limits of a multiprocessor of an H200 (CUDA C++ Programming Guide, compute capability 9.0)."""
RESERVED_SHARED_BYTES = 1024
"""Shared memory that CUDA takes per thread block."""


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    Attributes:
        name: name of the kernel.
        launches: number of times that the program starts it.
        grid: thread blocks.
        threads: threads of a thread block.
        registers: registers of a thread.
        spill_bytes: bytes per thread stored to and loaded from local memory for want of registers.
        shared_bytes: shared memory of a thread block.
    """

    name: str
    launches: int
    grid: tuple[int, ...]
    threads: int
    registers: int
    spill_bytes: int
    shared_bytes: int

    @property
    def blocks_per_multiprocessor(self) -> int:
        """The number of thread blocks that a multiprocessor holds at the same time."""
        warps = -(-self.threads // 32)
        registers = -(-self.registers * 32 // 256) * 256 * warps  # allocated per warp, in units of 256
        shared = self.shared_bytes + RESERVED_SHARED_BYTES
        return min(REGISTERS // registers, SHARED_BYTES // shared, THREADS // (32 * warps), BLOCKS)


def dump_flags(folder: Path | str) -> str:
    """Returns XLA flags that make the compiler leave PTX and the sequence of launches in a folder."""
    return f"--xla_dump_to={folder} --xla_dump_emitter_re=ptx"


_LAUNCH = re.compile(r" (\w+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\] +shared_memory: (\d+) bytes")


def read_dump(folder: Path | str, module: str, kernels: str = "") -> list[Kernel]:
    """Returns the kernels of a program, in the order of their first launch.

    Args:
        folder: that of `dump_flags`.
        module: name of the program, "jit_" and the function's name.
        kernels: regular expression for the beginnings of kernels' names; "" takes all, XLA's own too.

    Raises:
        ValueError: the folder has no such program, or the assembler cannot read it.
    """
    (sequence,) = list(Path(folder).glob(f"*.{module}.thunk_sequence.txt")) or [None]
    if sequence is None:
        raise ValueError(f"{folder} holds no dump of {module}: expected XLA_FLAGS with dump_flags()")
    launches = [found for found in _LAUNCH.findall(sequence.read_text()) if re.match(kernels, found[0])]
    assembled = {}
    for file in Path(folder).glob(f"*.{module}.*.ptx"):
        for name in re.findall(r"\.entry (\w+)", file.read_text()):
            assembled[name] = file
    found: dict[str, Kernel] = {}
    for name, grid, threads, shared in launches:
        if name in found:
            continue
        registers, spills = _assemble(assembled[name], name)
        shape = tuple(int(size) for size in grid.split(","))
        count, per_block = sum(launch[0] == name for launch in launches), [int(size) for size in threads.split(",")]
        found[name] = Kernel(
            name, count, shape, per_block[0] * per_block[1] * per_block[2], registers, spills, int(shared)
        )
    return list(found.values())


def mosaic_variables(folder: Path | str) -> dict[str, str]:
    """Returns environment variables that make Mosaic GPU leave the assembler's report in a folder, which must exist."""
    return {"MOSAIC_GPU_DUMP_TO": str(folder), "MOSAIC_GPU_DUMP_PTXAS": "1"}


def read_mosaic_dump(folder: Path | str, threads: int) -> list[Kernel]:
    """Returns all Mosaic GPU kernels that were compiled, by name; the caller knows the `threads` of a thread block."""
    found = []
    for file in sorted(Path(folder).glob("*.ptxas")):
        registers, spills = _parse(file.read_text(), file.name)
        shared = re.search(r"smem_scratch_bytes=(\d+)", file.with_suffix(".resources.txt").read_text())
        assert shared is not None, f"{file.stem}: no size of shared memory"
        found.append(Kernel(file.stem, 1, (), threads, registers, spills, int(shared[1])))
    return found


def _assemble(file: Path, name: str) -> tuple[int, int]:
    """Returns (registers, bytes of spills) that ptxas reports for a kernel."""
    command = [str(ptxas()), "-v", "-arch=sm_90a", str(file), "-o", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    return _parse(said.partition(f"Compiling entry function '{name}'")[2] or said, file.name)


def _parse(report: str, name: str) -> tuple[int, int]:
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    if registers is None or spills is None:
        raise ValueError(f"the assembler could not read {name}: {report.strip()[-300:]}")
    return int(registers[1]), int(spills[1]) + int(spills[2])
