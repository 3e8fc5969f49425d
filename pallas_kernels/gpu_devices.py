"""Tells what NVIDIA GPUs can do by the names that JAX gives them: a program may be traced for a card that is not here."""

from __future__ import annotations

# Part of a device's name -> compute capability (https://developer.nvidia.com/cuda-gpus); the first that fits counts.
_CAPABILITIES = (
    ("GB300", (10, 3)),
    ("B300", (10, 3)),
    ("GB200", (10, 0)),
    ("B200", (10, 0)),
    ("RTX PRO", (12, 0)),
    ("RTX 50", (12, 0)),
    ("GH200", (9, 0)),
    ("H200", (9, 0)),
    ("H100", (9, 0)),
    ("H800", (9, 0)),
    ("H20", (9, 0)),
    ("L40", (8, 9)),
    ("L4", (8, 9)),
    ("RTX 40", (8, 9)),
    ("RTX 6000 Ada", (8, 9)),
    ("A100", (8, 0)),
    ("A800", (8, 0)),
    ("A30", (8, 0)),
    ("A40", (8, 6)),
    ("A10", (8, 6)),
    ("RTX A", (8, 6)),
    ("RTX 30", (8, 6)),
    ("T4", (7, 5)),
    ("RTX 20", (7, 5)),
    ("V100", (7, 0)),
    ("P100", (6, 0)),
)

STREAMING_MULTIPROCESSORS = 132
"""Multiprocessors of an H100 or H200; on a card with fewer, thread blocks queue."""


def compute_capability(device_kind: str) -> tuple[int, int] | None:
    """Returns (major, minor) of a card such as "NVIDIA H200"; None for one that is not in the table."""
    return next((capability for name, capability in _CAPABILITIES if name in device_kind), None)


def shared_memory(device_kind: str) -> int:
    """Returns the bytes of shared memory that a thread block may have (CUDA C++ Programming Guide, "Technical specifications per
    compute capability"); those of the smallest cards for one that is not in the table."""
    capability = compute_capability(device_kind)
    if capability is not None and (9, 0) <= capability < (12, 0):
        return 227 << 10
    return 163 << 10 if capability == (8, 0) else 99 << 10


def why_not_capability(device_kind: str, least: tuple[int, int], for_what: str) -> str | None:
    """Says why a card lacks this compute capability; None where it has it (as a card not in the table is taken to)."""
    found = compute_capability(device_kind)
    if found is None or found >= least:
        return None
    return f"needs compute capability {least[0]}.{least[1]} {for_what}, {device_kind} has {found[0]}.{found[1]}"
