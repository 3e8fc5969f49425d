"""Decides which implementation of an op runs, and why: one table, in order of preference. `choose` is pure; `pick` also notes
what this process chose, for `explain`.

To add an implementation, write a module with `why_not(case) -> str | None` (None: can run; else the reason, as the end
of a sentence that starts with the implementation's name) and one function named like the op, and add its row to
IMPLEMENTATIONS. The module is imported only when its row's platform and requirements fit.

`LLM_INFER_KERNELS="paged_attention=xla,copy_pages=xla"` or an op's `implementation=` argument (stronger) overrides the
table; an override that cannot run is an error, never a silent second choice.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

ENVIRONMENT_VARIABLE = "LLM_INFER_KERNELS"
PLATFORMS = ("cpu", "gpu", "tpu")


@dataclass(frozen=True)
class Case:
    """A call as an implementation must know it to say whether it can run; everything is known while tracing.

    Attributes:
        platform: cpu, gpu or tpu.
        device_kind: the device's own name ("TPU v5 lite", "NVIDIA H200"), as JAX reports it.
        shapes: shape of each array argument.
        dtypes: dtype name of each array argument.
        options: static settings that matter to kernels (for example softcap, or whether there are sinks); `invariant` where
            a row must have the same bits in any company (see `pallas_kernels.numerics`).
    """

    platform: str
    device_kind: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        """Describes the case in one line: device, floating and quantised arrays with their shapes, options that are set."""
        arrays = [
            f"{name} {self.dtypes.get(name, '')}{list(shape)}"
            for name, shape in self.shapes.items()
            if self.dtypes.get(name) != "int32"
        ]
        options = [f"{name}={value}" for name, value in self.options.items() if value not in (None, False)]
        return f"{self.device_kind}: {', '.join([*arrays, *options])}"


@dataclass(frozen=True)
class Implementation:
    """A row of the table: the module that implements an op, where it can run, and packages that it imports."""

    name: str
    module: str
    platforms: tuple[str, ...] = PLATFORMS
    requires: tuple[str, ...] = ()

    def why_not(self, case: Case) -> str | None:
        """Says why this implementation cannot run the case; None where it can."""
        if case.platform not in self.platforms:
            return f"runs on {', '.join(self.platforms)}, not on {case.platform}"
        missing = [package for package in self.requires if importlib.util.find_spec(package) is None]
        if missing:
            return f"needs the package {', '.join(missing)}, which is not installed"
        return importlib.import_module(self.module).why_not(case)


@dataclass(frozen=True)
class Choice:
    """The implementation that runs, and what each one that was asked said: (name, reason) in that order."""

    op: str
    name: str
    reasons: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"{self.op}: {self.name} (" + "; ".join(f"{name}: {reason}" for name, reason in self.reasons) + ")"


_ATTENTION = (
    Implementation("cpu", "pallas_kernels.paged_attention.cpu", ("cpu",), ("llvmlite",)),
    Implementation("gpu_mosaic", "pallas_kernels.paged_attention.gpu_mosaic", ("gpu",)),
    Implementation("gpu_triton", "pallas_kernels.paged_attention.gpu_triton", ("gpu",)),
    Implementation("tpu", "pallas_kernels.paged_attention.tpu", ("tpu",)),
    Implementation("xla", "pallas_kernels.paged_attention.xla"),
    Implementation("reference", "pallas_kernels.paged_attention.reference"),
)
_QUANT_MATMUL = (
    Implementation("cpu", "pallas_kernels.quant_matmul.cpu", ("cpu",), ("llvmlite",)),
    Implementation("xla", "pallas_kernels.quant_matmul.xla"),
    Implementation("reference", "pallas_kernels.quant_matmul.reference"),
)
_COPY_PAGES = (
    Implementation("cpu", "pallas_kernels.paged_attention.cpu", ("cpu",), ("llvmlite",)),
    Implementation("gpu_triton", "pallas_kernels.paged_attention.gpu_copy", ("gpu",)),
    Implementation("tpu", "pallas_kernels.paged_attention.tpu_copy", ("tpu",)),
    Implementation("xla", "pallas_kernels.paged_attention.copy_pages"),
)
_GROUPED_MATMUL = (
    Implementation("gpu_triton", "pallas_kernels.grouped_matmul.gpu_triton", ("gpu",)),
    Implementation("ragged", "pallas_kernels.grouped_matmul.ragged"),
    Implementation("reference", "pallas_kernels.grouped_matmul.reference"),
)

_SCALED_MATMUL = (
    Implementation("gpu_triton", "pallas_kernels.scaled_matmul.gpu_triton", ("gpu",)),
    Implementation("xla", "pallas_kernels.scaled_matmul.xla"),
    Implementation("reference", "pallas_kernels.scaled_matmul.reference"),
)

_DRAW_TOKENS = (
    Implementation("cpu", "pallas_kernels.draw_tokens.cpu", ("cpu",), ("llvmlite",)),
    Implementation("gpu_triton", "pallas_kernels.draw_tokens.gpu_triton", ("gpu",)),
    Implementation("xla", "pallas_kernels.draw_tokens.xla"),
)
_ROW_SUMS = (
    Implementation("cpu", "pallas_kernels.row_sums.cpu", ("cpu",), ("llvmlite",)),
    Implementation("gpu_triton", "pallas_kernels.row_sums.gpu_triton", ("gpu",)),
    Implementation("xla", "pallas_kernels.row_sums.xla"),
)

_CAUSAL_CONV = (
    Implementation("cpu", "pallas_kernels.causal_conv.cpu", ("cpu",), ("llvmlite",)),
    Implementation("xla", "pallas_kernels.causal_conv.xla"),
    Implementation("reference", "pallas_kernels.causal_conv.reference"),
)

# op -> its implementations, the first that can run the case is taken.
IMPLEMENTATIONS: Mapping[str, tuple[Implementation, ...]] = {
    "paged_attention": _ATTENTION,
    "copy_pages": _COPY_PAGES,
    "quant_matmul": _QUANT_MATMUL,
    "scaled_matmul": _SCALED_MATMUL,
    "grouped_matmul": _GROUPED_MATMUL,
    "draw_tokens": _DRAW_TOKENS,
    "row_sums": _ROW_SUMS,
    "causal_conv": _CAUSAL_CONV,
}


def choose(op: str, case: Case, override: str | None = None, environ: Mapping[str, str] | None = None) -> Choice:
    """Picks the implementation of `op` for a case.

    Args:
        op: a key of IMPLEMENTATIONS.
        case: the call to run.
        override: name of the implementation to use; None takes that of the environment variable, or else follows the table's
            order.
        environ: the environment (os.environ by default).

    Raises:
        ValueError: the override names no implementation of this op or one that cannot run the case, no implementation
            can run it, or the environment variable cannot be read.
    """
    rows = {row.name: row for row in IMPLEMENTATIONS[op]}
    source = f"implementation={override!r}"
    if override is None:
        override = parse_overrides((os.environ if environ is None else environ).get(ENVIRONMENT_VARIABLE, "")).get(op)
        source = f"{ENVIRONMENT_VARIABLE} has {op}={override}"
    if override is not None:
        if override not in rows:
            raise ValueError(f"{source}: {op} has no such implementation, choose from {', '.join(rows)}")
        reason = rows[override].why_not(case)
        if reason is not None:
            raise ValueError(f"{source}: {op} cannot run it here: {override} {reason}")
        return Choice(op, override, ((override, f"asked for ({source})"),))
    reasons: list[tuple[str, str]] = []
    for row in rows.values():
        reason = row.why_not(case)
        if reason is None:
            return Choice(op, row.name, (*reasons, (row.name, "first in the table that can run it")))
        reasons.append((row.name, reason))
    listed = "; ".join(f"{name} {reason}" for name, reason in reasons)
    raise ValueError(f"no implementation of {op} can run {case}: {listed}")


# What `pick` chose in this process: (op, case in words) -> (choice, how often a program was traced with it).
_PICKED: dict[tuple[str, str], tuple[Choice, int]] = {}
MAX_PICKED = 512


def why_not_xla(case: Case) -> str | None:
    """Says why XLA's own sums cannot run a case on an accelerator: it chooses their order by the number of rows."""
    if case.options.get("invariant") and case.platform != "cpu":
        return "adds in an order that depends on the number of rows, which numerics='invariant' does not allow"
    return None


def pick(op: str, case: Case, override: str | None = None) -> Callable[..., Any]:
    """Returns the function that runs a case: that of `choose`, whose choice is noted for `explain`."""
    choice = choose(op, case, override)
    key = (op, case.summary())
    if key in _PICKED or len(_PICKED) < MAX_PICKED:
        _PICKED[key] = (choice, _PICKED.get(key, (choice, 0))[1] + 1)
    return implementation(op, choice.name)


def explain() -> str:
    """Returns a line for every choice that this process made while tracing: op, case, implementation, reasons."""
    return "\n".join(f"{choice} for {case}, traced {times}×" for (_, case), (choice, times) in _PICKED.items())


def implementation(op: str, name: str) -> Callable[..., Any]:
    """Returns the function that implements `op` under this name (a name that `choose` returned)."""
    (row,) = (row for row in IMPLEMENTATIONS[op] if row.name == name)
    return getattr(importlib.import_module(row.module), op)


def parse_overrides(text: str) -> dict[str, str]:
    """Reads the environment variable: comma-separated op=implementation.

    Raises:
        ValueError: an entry has another form or names an unknown op.
    """
    overrides: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        op, equals, name = (part.strip() for part in entry.partition("="))
        if not equals or op not in IMPLEMENTATIONS:
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE}={text!r}: expected op=implementation with an op of "
                f"{', '.join(IMPLEMENTATIONS)}, found {entry!r}"
            )
        overrides[op] = name
    return overrides


def target() -> tuple[str, str]:
    """Returns the platform and the device kind on which the code being traced will run.

    An abstract mesh in force (`jax.sharding.use_abstract_mesh`) names it, so programs compiled ahead of time for a chip
    that is not here choose that chip's kernels; otherwise it is JAX's default device.
    """
    import jax  # here, so that the table can be read without JAX

    abstract = jax.sharding.get_abstract_mesh().abstract_device
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]  (set at run time by jax)
    device = abstract if abstract is not None else (default or jax.devices()[0])
    platform, kind = (device, device) if isinstance(device, str) else (device.platform, device.device_kind)
    return ("gpu" if platform in ("cuda", "rocm") else platform), kind
