"""`llm-infer kernels`: the crossovers between kernels that hold on this machine, and measuring them."""

from __future__ import annotations

from llm_infer.errors import UserError
from llm_infer.weights.progress import Progress
from pallas_kernels import cpu_ffi, tuned
from pallas_kernels.quant_matmul.formats import FORMATS


def tune_machine() -> None:
    """Measures all kinds of weights and keeps the result for this user.

    Raises:
        UserError: the native kernels cannot run here.
    """
    cpu = _cpu()
    from pallas_kernels.quant_matmul.tune import measure_kinds

    measured: tuned.Crossovers = {}
    with Progress().task("Measuring kernels", total=len(FORMATS)) as bar:
        for kind, crossovers in measure_kinds():
            measured[kind] = crossovers
            bar.advance(1)
    tuned.write(cpu, measured)


def report() -> str:
    """A line for each kind of weights: which kernel serves how many rows, in precision exact and fast.

    Raises:
        UserError: the native kernels cannot run here.
    """
    cpu = _cpu()
    from pallas_kernels.quant_matmul.cpu import INT8_KINDS, INT8_ROWS

    source = tuned.source_of(cpu)
    measured = tuned.crossovers(cpu)
    lines = [
        f"{cpu}: crossovers from {source}" if source else f"{cpu}: nothing measured yet (`llm-infer kernels --tune`)",
        f"{'weights':<10}{'exact: native kernel':<26}{'fast: int8 activations':<26}",
    ]
    for kind in FORMATS:
        found = measured.get(kind, {})
        native = _rows(found.get("native_rows"), "then XLA")
        int8 = _rows(found.get("int8_rows", INT8_ROWS.get(kind)), "then as exact") if kind in INT8_KINDS else "no"
        lines.append(f"{kind:<10}{native:<26}{int8:<26}")
    return "\n".join(lines)


def _rows(most: int | None, then: str) -> str:
    if most is None:
        return "any number of rows"
    return f"up to {most} rows, {then}" if most else f"never, {then.removeprefix('then ')}"


def _cpu() -> str:
    if reason := cpu_ffi.why_not():
        raise UserError(f"the native CPU kernels cannot run here, XLA serves: {reason}")
    from pallas_kernels.cpu_ffi.compile import host_target

    return host_target().cpu
