"""A small tracing language for native CPU kernels: Python that runs once and writes LLVM IR with explicit vectors.

A kernel body is ordinary Python over `Value` (an SSA scalar or vector), `Ptr` (typed memory) and `Var` (a mutable local).
Python loops unroll, `with k.range(...)` makes a loop at run time. Nothing is reassociated or contracted: a sum has the
order in which it is written, which makes a row's result independent of the batch. LLVM splits vectors wider than the machine's,
so the same source is right on every CPU; the choice of width only affects speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from pallas_kernels.cpu_ffi.compile import Target
from pallas_kernels.cpu_ffi.values import (
    BF16,
    F16,
    F32,
    F64,
    I1,
    I8,
    I16,
    I32,
    I64,
    POINTER,
    Ptr,
    Value,
    Var,
    element_bytes,
    element_type,
)

__all__ = [
    "BF16",
    "F16",
    "F32",
    "F64",
    "I1",
    "I8",
    "I16",
    "I32",
    "I64",
    "POINTER",
    "Emitter",
    "Ptr",
    "Value",
    "Var",
    "element_bytes",
]


class Emitter:
    """Writes one LLVM function for a target (its `lanes`, `registers` and `unit_lanes` steer how)."""

    def __init__(self, function: ir.Function, target: Target) -> None:
        self.function, self.target = function, target
        self.lanes, self.registers, self.unit_lanes = target.lanes, target.registers, target.unit_lanes
        self.module = function.module
        self.entry = function.append_basic_block("entry")
        self.builder: Any = ir.IRBuilder(function.append_basic_block("body"))

    def finish(self) -> None:
        """Closes the function: the entry block, which holds the stack slots, falls through to the body."""
        if not self.builder.block.is_terminated:
            self.builder.ret_void()
        ir.IRBuilder(self.entry).branch(self.function.basic_blocks[1])

    # constants and conversions
    def const(self, type_: Any, value: float | Sequence[float]) -> Value:
        """Returns a constant; one number makes a splat of a vector type, a sequence gives every lane."""
        if isinstance(type_, ir.VectorType) and not isinstance(value, Sequence):
            value = [value] * type_.count
        return Value(self, ir.Constant(type_, list(value) if isinstance(value, Sequence) else value))

    def i64(self, value: int) -> Value:
        return self.const(I64, value)

    def like(self, value: Value, number: float) -> Value:
        return self.const(value.type, number)

    def index(self, index: Value | int) -> Any:
        return I64(index) if isinstance(index, int) else index.to(I64).ssa

    def splat(self, value: Value, count: int) -> Value:
        first = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
        return Value(self, self.builder.insert_element(first, value.ssa, I32(0))).shuffle([0] * count)

    def match(self, a: Value, b: Value | float) -> tuple[Value, Value]:
        """Brings two operands to one type: numbers become constants, a scalar is splat to a vector, ints widen."""
        if not isinstance(b, Value):
            return a, self.like(a, b)
        if isinstance(a.type, ir.VectorType) and not isinstance(b.type, ir.VectorType):
            return a, self.splat(b, a.type.count)
        if isinstance(b.type, ir.VectorType) and not isinstance(a.type, ir.VectorType):
            return self.splat(a, b.type.count), b
        if isinstance(a.type, ir.IntType) and isinstance(b.type, ir.IntType) and a.type.width != b.type.width:
            wide = a.type if a.type.width > b.type.width else b.type
            return a.to(wide), b.to(wide)
        return a, b

    def zeros(self, element: Any, count: int | None = None) -> Value:
        return self.const(element if count is None else ir.VectorType(element, count), 0)

    # control flow
    @contextmanager
    def range(self, start: Value | int, stop: Value | int, step: Value | int = 1) -> Iterator[Value]:
        """Opens a counted loop at run time; yields the int64 counter."""
        counter = Var(self, Value(self, self.index(start)))
        end, by = self.index(stop), self.index(step)
        head, body, tail = (self.function.append_basic_block(name) for name in ("loop", "loop_body", "loop_end"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        now = counter.v
        self.builder.cbranch(self.builder.icmp_signed("<", now.ssa, end), body, tail)
        self.builder.position_at_end(body)
        yield now
        counter.v = now + Value(self, by)
        self.builder.branch(head)
        self.builder.position_at_end(tail)

    @contextmanager
    def loop_while(self) -> Iterator[Any]:
        """Opens a loop that ends when the callable it yields is given a false condition: `with ... as go_on: go_on(c); ...`."""
        head, tail = self.function.append_basic_block("while"), self.function.append_basic_block("while_end")
        self.builder.branch(head)
        self.builder.position_at_end(head)

        def go_on(condition: Value) -> None:
            body = self.function.append_basic_block("while_body")
            self.builder.cbranch(condition.ssa, body, tail)
            self.builder.position_at_end(body)

        yield go_on
        self.builder.branch(head)
        self.builder.position_at_end(tail)

    @contextmanager
    def when(self, condition: Value, likely: bool | None = None) -> Iterator[None]:
        with self.builder.if_then(condition.ssa, likely=likely):
            yield

    @contextmanager
    def when_else(self, condition: Value) -> Iterator[tuple[Any, Any]]:
        """Opens a branch with two ways: `with k.when_else(c) as (yes, no):`, then `with yes: ...` and `with no: ...`."""
        with self.builder.if_else(condition.ssa) as branches:
            yield branches

    def select(self, condition: Value, yes: Value, no: Value | float) -> Value:
        yes, no = self.match(yes, no)
        return Value(self, self.builder.select(condition.ssa, yes.ssa, no.ssa))

    # memory
    def entry_alloca(self, type_: Any, align: int | None = None) -> Any:
        slot: Any = ir.IRBuilder(self.entry).alloca(type_)
        slot.type = POINTER  # llvmlite still gives it a typed pointer
        if align is not None:
            slot.align = align
        return slot

    def scratch(self, element: Any, count: int) -> Ptr:
        """Reserves uninitialised stack memory for this call, aligned to a cache line. Keep it far below a thread's stack (1
        MiB)."""
        return Ptr(self, self.entry_alloca(ir.ArrayType(element, count), align=64), element)

    def var(self, initial: Value) -> Var:
        return Var(self, initial)

    # arithmetic
    def intrinsic(self, name: str, result: Any, args: Sequence[Any]) -> Any:
        """Calls a function by name, and declares it on first use (LLVM intrinsics and C library functions)."""
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(result, [a.type for a in args]), name)
        return self.builder.call(function, list(args))

    def _math(self, name: str, *args: Value) -> Value:
        type_ = args[0].type
        element = element_type(type_)
        letter = {ir.FloatType: "f32", ir.DoubleType: "f64"}.get(type(element)) or f"i{element.width}"
        suffix = f"v{type_.count}{letter}" if isinstance(type_, ir.VectorType) else letter
        return Value(self, self.intrinsic(f"llvm.{name}.{suffix}", type_, [a.ssa for a in args]))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """Returns a * b + c, rounded once. Scalars among vectors are splat."""
        count = next((v.type.count for v in (a, b, c) if isinstance(v.type, ir.VectorType)), None)
        args = [v if count is None or isinstance(v.type, ir.VectorType) else self.splat(v, count) for v in (a, b, c)]
        return self._math("fma", *args)

    def max(self, a: Value, b: Value | float) -> Value:
        a, b = self.match(a, b)
        return self.select(a > b, a, b) if a.is_float else self._math("smax", a, b)

    def min(self, a: Value, b: Value | float) -> Value:
        a, b = self.match(a, b)
        return self.select(a < b, a, b) if a.is_float else self._math("smin", a, b)

    def abs(self, a: Value) -> Value:
        return self._math("fabs", a)

    def round_even(self, a: Value) -> Value:
        """Returns the nearest integer, ties to even, as a float."""
        return self._math("rint", a)

    def sqrt(self, a: Value) -> Value:
        return self._math("sqrt", a)

    def _fold(self, vector: Value, combine: Any) -> Value:
        while (count := vector.type.count) > 1:
            half = count // 2
            vector = combine(vector.shuffle(range(half)), vector.shuffle(range(half, count)))
        return vector.lane(0)

    def sum_lanes(self, vector: Value) -> Value:
        """Returns the sum of all lanes by a fixed tree: upper half onto lower half, again and again."""
        return self._fold(vector, lambda a, b: a + b)

    def sum4(self, vectors: Sequence[Value]) -> Value:
        """Returns the sums of four vectors as one vector of four, each by the same tree as `sum_lanes`."""
        vectors = list(vectors)
        while vectors[0].type.count > 4:
            half = vectors[0].type.count // 2
            vectors = [v.shuffle(range(half)) + v.shuffle(range(half, 2 * half)) for v in vectors]
        pairs = [a.shuffle([0, 4, 1, 5], b) + a.shuffle([2, 6, 3, 7], b) for a, b in (vectors[:2], vectors[2:])]
        return pairs[0].shuffle([0, 1, 4, 5], pairs[1]) + pairs[0].shuffle([2, 3, 6, 7], pairs[1])

    def max_lanes(self, vector: Value) -> Value:
        return self._fold(vector, self.max)

    def concat(self, parts: Sequence[Value]) -> Value:
        """Joins vectors of one length (a power of two of them) end to end."""
        while len(parts) > 1:
            n = parts[0].type.count
            parts = [a.shuffle(range(2 * n), b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    def bf16_to_f32(self, bits: Value) -> Value:
        wide = bits.to(I32, signed=False) << 16
        return wide.bits(ir.VectorType(F32, bits.type.count) if isinstance(bits.type, ir.VectorType) else F32)

    def f32_to_bf16(self, value: Value) -> Value:
        """Rounds to nearest, ties to even (finite values; NaN stays NaN)."""
        wide = value.bits(ir.VectorType(I32, value.type.count) if isinstance(value.type, ir.VectorType) else I32)
        rounded = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16
        quiet = (wide >> 16) | 0x40
        is_nan = Value(self, self.builder.fcmp_unordered("uno", value.ssa, value.ssa))
        return self.select(is_nan, quiet, rounded).to(I16)

    def exp(self, x: Value) -> Value:
        """Returns e**x for finite float32 x (relative error under 2e-7); below -87.3 it is 0, above 88 about 1.65e38.

        It follows Cephes' expf: x = n ln 2 + r with |r| <= ln(2)/2, a degree-6 polynomial in r, then 2**n by exponent bits.
        """
        x = self.max(self.min(x, 88.0), -104.0)
        n = self.round_even(x * 1.4426950408889634)
        r = self.fma(n, self.like(x, -0.693359375), x)
        r = self.fma(n, self.like(x, 2.12194440e-4), r)
        p = self.like(x, 1.9875691500e-4)
        for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = self.fma(p, r, self.like(x, coefficient))
        p = self.fma(p * r, r, r) + 1.0
        int_type = ir.VectorType(I32, x.type.count) if isinstance(x.type, ir.VectorType) else I32
        power = ((n.to(I32) + 127) << 23).bits(x.type)
        del int_type
        return self.select(x > -87.3, p * power, self.like(x, 0.0))
