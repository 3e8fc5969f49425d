"""The body of the native row_sums: four vectors of partial sums for each row, added up in a fixed order."""

from __future__ import annotations

from pallas_kernels.cpu_ffi.bridge import Frame
from pallas_kernels.cpu_ffi.emit import F32, Emitter, Value

LANES = 16  # on every CPU, so that all add in the same order
VECTORS = 4
TASK_NUMBERS = 1 << 15  # about as many as are worth waking a thread for


def body(k: Emitter, a: Frame, kind: str) -> None:
    """Emits the kernel: `sums` [R] of x [R, E]."""
    rows = k.max(k.i64(TASK_NUMBERS) // k.max(a.E, 1), 1)

    def task(k: Emitter, a: Frame, number: Value) -> None:
        with k.range(number * a.rows, k.min(number * a.rows + a.rows, a.R)) as row:
            a.sums[row] = _row_sum(k, a, row, kind)

    a.parallel((a.R + rows - 1) // rows, task, rows=rows)


def _row_sum(k: Emitter, a: Frame, row: Value, kind: str) -> Value:
    x, shift = a.x + row * a.E, a.shift[row]
    block = LANES * VECTORS

    def of(number: Value) -> Value:
        number = number - k.match(number, shift)[1]
        return {
            "values": lambda: number,
            "squares": lambda: number * number,
            "exps": lambda: k.exp(number),
            "above": lambda: k.select(number > 0.0, k.like(number, 1.0), 0.0),
        }[kind]()

    sums, rest = [k.var(k.zeros(F32, LANES)) for _ in range(VECTORS)], k.var(k.const(F32, 0.0))
    blocks, vectors = a.E // block * block, a.E // LANES * LANES
    with k.range(0, blocks, block) as at:
        for i, sum_ in enumerate(sums):
            sum_.v = sum_.v + of(x.load(at + i * LANES, LANES))
    with k.range(blocks, vectors, LANES) as at:
        sums[0].v = sums[0].v + of(x.load(at, LANES))
    with k.range(vectors, a.E) as at:
        rest.v = rest.v + of(x[at])
    return k.sum_lanes((sums[0].v + sums[1].v) + (sums[2].v + sums[3].v)) + rest.v
