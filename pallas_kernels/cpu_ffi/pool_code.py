"""The thread pool's machine code: `parallel_run(task, frame, n)`, the life of a helper thread, and their shared state."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from pallas_kernels.cpu_ffi.compile import host_target
from pallas_kernels.cpu_ffi.emit import I1, I8, I32, I64, POINTER, Emitter, Ptr, Value

# Byte offsets in the pool's state: each word that one side writes while the other polls has a cache line of its own.
TICKET, NEXT, TASK, FRAME, COUNT, FLOATS, BUSY, SLEEPERS, LIMIT, SPIN, MUTEX, CONDITION = (
    0, 128, 256, 264, 272, 280, 384, 388, 392, 400, 512, 640,
)  # fmt: skip
STATE_BYTES = 768
# The ticket: generation << 32 | closed << 31 | number of helpers inside. A helper may enter while it is not closed.
TASK_KIND = ir.FunctionType(ir.VoidType(), [POINTER, I64])  # task(frame, number)
CLOSED, INSIDE, ONE_GENERATION = 1 << 31, (1 << 31) - 1, 1 << 32


class _Pool:
    """Emits reads and writes of the pool's state."""

    def __init__(self, k: Emitter) -> None:
        self.k, self.b = k, k.builder
        self.base = Ptr(k, k.module.globals["pool_state"], I8)
        self.is_arm = "aarch64" in k.module.triple or "arm64" in k.module.triple
        self.is_x86 = "x86" in k.module.triple

    def at(self, offset: int, type_: ir.IntType = I8) -> Any:
        address: Any = (self.base + offset).ssa
        address.type = ir.PointerType(type_)  # llvmlite's atomics still need a typed pointer
        return address

    def load(self, offset: int, type_: ir.IntType) -> Value:
        loaded = self.b.load_atomic(self.at(offset, type_), "seq_cst", type_.width // 8, typ=type_)
        return Value(self.k, loaded)

    def store(self, offset: int, value: Value) -> None:
        self.b.store_atomic(value.ssa, self.at(offset, value.type), "seq_cst", value.type.width // 8)

    def add(self, offset: int, amount: Value) -> Value:
        """Adds atomically and returns the value before."""
        return Value(self.k, self.b.atomic_rmw("add", self.at(offset, amount.type), amount.ssa, "seq_cst"))

    def swap_if(self, offset: int, expected: Value, new: Value) -> Value:
        """Stores `new` if the word still is `expected`; returns whether it was."""
        pair = self.b.cmpxchg(self.at(offset, new.type), expected.ssa, new.ssa, "seq_cst")
        return Value(self.k, self.b.extract_value(pair, 1))

    def pause(self) -> None:
        if self.is_arm:
            self.k.intrinsic("llvm.aarch64.hint", ir.VoidType(), [I32(1)])
        elif self.is_x86:
            self.k.intrinsic("llvm.x86.sse2.pause", ir.VoidType(), [])

    def keep_float_mode(self) -> None:
        """Notes how this thread rounds and whether it takes denormal floats as 0, as XLA's threads do."""
        if self.is_arm:
            self.base.as_(I64)[FLOATS // 8] = Value(self.k, self.k.intrinsic("llvm.aarch64.get.fpcr", I64, []))
        elif self.is_x86:
            self.k.intrinsic("llvm.x86.sse.stmxcsr", ir.VoidType(), [(self.base + FLOATS).ssa])

    def take_float_mode(self) -> None:
        """Takes the noted mode for this thread: a result must not depend on the thread on which a task runs."""
        if self.is_arm:
            self.k.intrinsic("llvm.aarch64.set.fpcr", ir.VoidType(), [self.base.as_(I64)[FLOATS // 8].ssa])
        elif self.is_x86:
            self.k.intrinsic("llvm.x86.sse.ldmxcsr", ir.VoidType(), [(self.base + FLOATS).ssa])

    def c_call(self, name: str, *offsets: int) -> None:
        self.k.intrinsic(name, I32, [self.at(offset) for offset in offsets])

    def run_tasks(self) -> None:
        """Takes task numbers until none is left."""
        k = self.k
        task, frame = self.base.function_at(TASK // 8, TASK_KIND), self.base.pointer_at(FRAME // 8, I8)
        count = self.base.as_(I64)[COUNT // 8]
        with k.loop_while() as go_on:
            number = self.add(NEXT, k.i64(1))
            go_on(number < count)
            k.builder.call(task, [frame.ssa, number.ssa])


def _emit_run(module: ir.Module) -> None:
    kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(TASK_KIND), POINTER, I64])
    function = ir.Function(module, kind, "parallel_run")
    k = Emitter(function, host_target())
    pool = _Pool(k)
    task, frame, count = function.args[0], function.args[1], Value(k, function.args[2])
    alone = (count <= 1).ssa
    alone = k.builder.or_(alone, (pool.load(LIMIT, I32) <= 1).ssa)
    mine = k.var(k.const(I1, 0))
    with k.builder.if_then(k.builder.not_(alone)):
        mine.v = pool.swap_if(BUSY, k.const(I32, 0), k.const(I32, 1))
    with k.when_else(mine.v) as (yes, no):
        with yes:
            state = pool.base.as_(POINTER)
            k.builder.store(task, (state + TASK // 8).ssa)
            k.builder.store(frame, (state + FRAME // 8).ssa)
            pool.base.as_(I64)[COUNT // 8] = count
            pool.keep_float_mode()
            pool.store(NEXT, k.i64(0))
            generation = pool.load(TICKET, I64) & ~(ONE_GENERATION - 1)
            pool.store(TICKET, generation + ONE_GENERATION)
            with k.when(pool.load(SLEEPERS, I32) > 0):
                pool.c_call("pthread_mutex_lock", MUTEX)
                pool.c_call("pthread_cond_broadcast", CONDITION)
                pool.c_call("pthread_mutex_unlock", MUTEX)
            pool.run_tasks()
            pool.add(TICKET, k.i64(CLOSED))
            patience = k.var(k.i64(0))
            with k.loop_while() as go_on:
                go_on((pool.load(TICKET, I64) & INSIDE).ne(0))
                pool.pause()
                patience.v = patience.v + 1
                with k.when(patience.v > pool.base.as_(I64)[SPIN // 8]):  # a helper was descheduled: let it run
                    k.intrinsic("sched_yield", I32, [])
            pool.store(BUSY, k.const(I32, 0))
        with no, k.range(0, count) as number:
            k.builder.call(task, [frame, number.ssa])
    k.finish()


def _emit_helper(module: ir.Module) -> ir.Function:
    """Emits a helper thread's life; its argument is its number, 1 … limit-1."""
    function = ir.Function(module, ir.FunctionType(POINTER, [POINTER]), "helper")
    k = Emitter(function, host_target())
    pool = _Pool(k)
    number = Value(k, k.builder.ptrtoint(function.args[0], I64))
    seen = k.var(k.i64(0))

    def work_waits() -> tuple[Value, Value]:
        ticket = pool.load(TICKET, I64)
        new = (ticket & ~(ONE_GENERATION - 1)).ne(seen.v)
        allowed = number < pool.load(LIMIT, I32).to(I64)
        return ticket, (ticket & CLOSED).eq(0) & new & allowed

    with k.loop_while() as forever:
        forever(k.const(I1, 1))
        spins = k.var(pool.base.as_(I64)[SPIN // 8])
        with k.loop_while() as go_on:
            _, ready = work_waits()
            go_on((spins.v > 0) & (ready ^ 1))
            pool.pause()
            spins.v = spins.v - 1
        _, ready = work_waits()
        with k.when(ready ^ 1):
            # The thread sleeps until a call begins. The call may be over before the thread runs: then it spins, awake for the
            # next one.
            pool.c_call("pthread_mutex_lock", MUTEX)
            pool.add(SLEEPERS, k.const(I32, 1))
            generation = pool.load(TICKET, I64) & ~(ONE_GENERATION - 1)
            with k.loop_while() as go_on:
                ticket, ready = work_waits()
                go_on((ready ^ 1) & (ticket & ~(ONE_GENERATION - 1)).eq(generation))
                pool.c_call("pthread_cond_wait", CONDITION, MUTEX)
            pool.add(SLEEPERS, k.const(I32, -1))
            pool.c_call("pthread_mutex_unlock", MUTEX)
        ticket, ready = work_waits()
        with k.when(ready), k.when(pool.swap_if(TICKET, ticket, ticket + 1)):
            pool.take_float_mode()
            pool.run_tasks()
            seen.v = ticket & ~(ONE_GENERATION - 1)
            pool.add(TICKET, k.i64(-1))
    k.builder.ret(ir.Constant(POINTER, None))
    ir.IRBuilder(k.entry).branch(function.basic_blocks[1])
    return function


def build_pool() -> ir.Module:
    """Builds the module with the pool's state, `parallel_run`, `num_threads`, `start_helper(number)` and `spin(n)`."""
    module = ir.Module("cpu_pool")
    module.triple = host_target().triple
    state: Any = ir.GlobalVariable(module, ir.ArrayType(I8, STATE_BYTES), "pool_state")
    state.initializer, state.align = ir.Constant(state.value_type, None), 128
    state.type = POINTER
    _emit_run(module)
    helper = _emit_helper(module)

    start = ir.Function(module, ir.FunctionType(I32, [I64]), "start_helper")
    k = Emitter(start, host_target())
    thread = k.scratch(I64, 1)
    argument = k.builder.inttoptr(start.args[0], POINTER)
    null = ir.Constant(POINTER, None)
    result = k.intrinsic("pthread_create", I32, [thread.ssa, null, helper, argument])
    k.builder.ret(result)
    k.finish()

    prepare = ir.Function(module, ir.FunctionType(POINTER, []), "prepare_pool")
    k = Emitter(prepare, host_target())
    pool = _Pool(k)
    null = ir.Constant(POINTER, None)
    k.intrinsic("pthread_mutex_init", I32, [pool.at(MUTEX), null])
    k.intrinsic("pthread_cond_init", I32, [pool.at(CONDITION), null])
    pool.store(TICKET, k.i64(CLOSED))
    k.builder.ret(pool.base.ssa)
    k.finish()

    limit = ir.Function(module, ir.FunctionType(I64, []), "num_threads")
    k = Emitter(limit, host_target())
    k.builder.ret(_Pool(k).load(LIMIT, I32).to(I64).ssa)
    k.finish()

    spin = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64]), "spin")
    k = Emitter(spin, host_target())
    pool = _Pool(k)
    with k.range(0, Value(k, spin.args[0])):
        pool.load(TICKET, I64)
        pool.load(LIMIT, I32)
        pool.pause()
    k.finish()
    return module
