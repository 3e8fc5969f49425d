"""`llm-infer kernels`: which kernels are chosen here and on known chips, crossovers of this machine, and measuring them."""

from __future__ import annotations

from llm_infer.base.errors import UserError
from llm_infer.base.progress import Progress
from pallas_kernels import cpu_ffi, dispatch, tuned
from pallas_kernels.quant_matmul import tiles_pay
from pallas_kernels.quant_matmul.formats import FORMATS
from pallas_kernels.quant_matmul.tiles import ROWS
from pallas_kernels.targets import TARGETS
from pallas_kernels.typical import typical_cases


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


def choices(chip: str | None = None) -> str:
    """Says which implementation is chosen for typical cases of every op, and why not those before it.

    Args:
        chip: a name of `pallas_kernels.targets.TARGETS` or "here"; None shows this machine and all chips.

    Raises:
        UserError: an unknown chip.
    """
    platform, kind = dispatch.target()
    machines = {"here": (platform, kind)} | {name: (t.platform, t.device_kind) for name, t in TARGETS.items()}
    if chip is not None and chip not in machines:
        raise UserError(f"--chip is {chip!r}, expected one of {', '.join(machines)}")
    lines = []
    for name in machines if chip is None else [chip]:
        lines.append(f"{name} ({machines[name][1]})")
        for op, label, case in typical_cases(*machines[name]):
            choice = dispatch.choose(op, case)
            others = [f"{row} {reason}" for row, reason in choice.reasons[:-1]]
            if chip is None:  # that another platform's kernel does not run here is no news in the overview
                others = [reason for reason in others if " runs on " not in reason]
            lines.append(f"  {op:<16}{label:<36}{choice.name:<12}{'; '.join(others)}".rstrip())
    return "\n".join(lines)


def report() -> str:
    """Writes a line for each kind of weights: which kernel serves how many rows, in precision exact and fast.

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
    if woven := [kind for kind in FORMATS if tiles_pay(kind, ROWS)]:
        kinds = ", ".join(woven)
        lines.append(
            f"matrices of {kinds} whose rows are a multiple of {ROWS} are woven at loading: native for any number"
        )
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
