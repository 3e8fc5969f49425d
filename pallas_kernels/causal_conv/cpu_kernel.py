"""The body of the native causal convolution: vectors of channels go over the rows of each sequence with their last inputs in
registers."""

from __future__ import annotations

from pallas_kernels.cpu_ffi.bridge import Frame
from pallas_kernels.cpu_ffi.emit import F32, I64, Emitter, Value

LANES = 16
TASK_NUMBERS = 1 << 15  # about as many as are worth waking a thread for


def body(k: Emitter, a: Frame, taps: int) -> None:
    """Emits the kernel: `out` [T, E] and the states written in place; a task has some channels of all rows."""
    wanted = k.i64(TASK_NUMBERS) // k.max(a.T, 1)
    channels = (wanted + LANES - 1) // LANES * LANES
    channels = k.max(channels, LANES)

    def task(k: Emitter, a: Frame, number: Value) -> None:
        first = number * a.channels
        last = k.min(first + a.channels, a.E)
        vectors = first + (last - first) // LANES * LANES
        with k.range(first, vectors, LANES) as channel:
            _channels(k, a, channel, LANES, taps)
        with k.range(vectors, last) as channel:
            _channels(k, a, channel, None, taps)

    a.parallel((a.E + channels - 1) // channels, task, channels=channels)


def _channels(k: Emitter, a: Frame, channel: Value, lanes: int | None, taps: int) -> None:
    """Convolves a vector of channels in all sequences, and sets those of the rows of padding to 0."""
    kept = taps - 1
    weights = [a.taps.load(channel + tap * a.E, lanes) for tap in range(taps)]
    layer = a.layer[0].to(I64)
    with k.range(0, a.S) as sequence:
        first, last = (a.q_start[sequence + i].to(I64) for i in (0, 1))
        source, target = (each[sequence].to(I64) for each in (a.state_from, a.state_to))
        taken = first + a.state_count[sequence].to(I64)
        with k.when(first < last):
            before = a.states + (layer * a.N + source) * (kept * a.E) + channel
            old = [k.select(source > 0, before.load(i * a.E, lanes), k.zeros(F32, lanes)) for i in range(kept)]
            window, new = [k.var(each) for each in old], [k.var(each) for each in old]
            with k.range(first, last) as row:
                x = a.x.load(row * a.E + channel, lanes)
                inputs = [*(each.v for each in window), x]
                total = inputs[0] * weights[0]
                for each, weight in zip(inputs[1:], weights[1:], strict=True):
                    total = k.fma(each, weight, total)
                a.out.store(row * a.E + channel, total)
                for each, value in zip(window, inputs[1:], strict=True):
                    each.v = value
                with k.when((row + 1).eq(taken)):
                    for each, value in zip(new, inputs[1:], strict=True):
                        each.v = value
            after = a.states + (layer * a.N + target) * (kept * a.E) + channel
            for i, each in enumerate(new):
                after.store(i * a.E, each.v)
    with k.range(a.q_start[a.S].to(I64), a.T) as row:
        a.out.store(row * a.E + channel, k.zeros(F32, lanes))
