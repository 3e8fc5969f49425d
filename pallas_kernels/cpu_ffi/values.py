"""The values of the kernel language: scalars and vectors, typed memory, mutable locals (see `emit`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llvmlite import ir

if TYPE_CHECKING:
    from pallas_kernels.cpu_ffi.emit import Emitter

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
BF16 = I16  # loaded as bits: bf16 -> f32 is a shift (Emitter.bf16_to_f32), and no CPU before Zen 4 has more
POINTER = ir.PointerType()

FLOAT_TYPES = (ir.HalfType, ir.FloatType, ir.DoubleType)


def element_type(type_: Any) -> Any:
    """Returns the scalar type of a scalar or vector type."""
    return type_.element if isinstance(type_, ir.VectorType) else type_


def element_bytes(type_: Any) -> int:
    """Returns the size in memory of a scalar or vector type."""
    if isinstance(type_, ir.VectorType):
        return type_.count * element_bytes(type_.element)
    if isinstance(type_, ir.IntType):
        return type_.width // 8
    return {ir.HalfType: 2, ir.FloatType: 4, ir.DoubleType: 8, ir.PointerType: 8}[type(type_)]


class Value:
    """An SSA scalar or vector. Integers are signed where it matters (compare, division, conversion, widening)."""

    def __init__(self, k: Emitter, ssa: Any) -> None:
        self.k, self.ssa = k, ssa

    @property
    def type(self) -> Any:
        return self.ssa.type

    @property
    def is_float(self) -> bool:
        return isinstance(element_type(self.type), FLOAT_TYPES)

    def _binary(self, other: Value | float, int_op: str, float_op: str | None) -> Value:
        a, b = self.k.match(self, other)
        op = float_op if a.is_float else int_op
        if op is None:
            raise TypeError(f"{int_op} is not defined on {a.type}")
        return Value(self.k, getattr(self.k.builder, op)(a.ssa, b.ssa))

    def __add__(self, other: Value | float) -> Value:
        return self._binary(other, "add", "fadd")

    def __sub__(self, other: Value | float) -> Value:
        return self._binary(other, "sub", "fsub")

    def __rsub__(self, other: float) -> Value:
        return self.k.like(self, other) - self

    def __mul__(self, other: Value | float) -> Value:
        return self._binary(other, "mul", "fmul")

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: Value | float) -> Value:
        return self._binary(other, "sdiv", "fdiv")

    def __floordiv__(self, other: Value | int) -> Value:
        """Returns the integer quotient of non-negative values."""
        return self._binary(other, "udiv", None)

    def __mod__(self, other: Value | int) -> Value:
        """Returns the integer remainder of non-negative values."""
        return self._binary(other, "urem", None)

    def __and__(self, other: Value | int) -> Value:
        return self._binary(other, "and_", None)

    def __or__(self, other: Value | int) -> Value:
        return self._binary(other, "or_", None)

    def __xor__(self, other: Value | int) -> Value:
        return self._binary(other, "xor", None)

    def __lshift__(self, other: Value | int) -> Value:
        return self._binary(other, "shl", None)

    def __rshift__(self, other: Value | int) -> Value:
        """Returns the logical shift right (zeros come in)."""
        return self._binary(other, "lshr", None)

    def _compare(self, op: str, other: Value | float) -> Value:
        a, b = self.k.match(self, other)
        build = self.k.builder.fcmp_ordered if a.is_float else self.k.builder.icmp_signed
        return Value(self.k, build(op, a.ssa, b.ssa))

    def __lt__(self, other: Value | float) -> Value:
        return self._compare("<", other)

    def __le__(self, other: Value | float) -> Value:
        return self._compare("<=", other)

    def __gt__(self, other: Value | float) -> Value:
        return self._compare(">", other)

    def __ge__(self, other: Value | float) -> Value:
        return self._compare(">=", other)

    def eq(self, other: Value | float) -> Value:
        return self._compare("==", other)

    def ne(self, other: Value | float) -> Value:
        return self._compare("!=", other)

    def to(self, element: Any, signed: bool = True) -> Value:
        """Converts every element: widen, truncate, int <-> float (toward zero), float <-> float."""
        source = element_type(self.type)
        target = ir.VectorType(element, self.type.count) if isinstance(self.type, ir.VectorType) else element
        if source == element:
            return self
        b = self.k.builder
        if isinstance(source, ir.IntType) and isinstance(element, ir.IntType):
            op = b.trunc if element.width < source.width else b.sext if signed else b.zext
        elif isinstance(source, ir.IntType):
            op = b.sitofp if signed else b.uitofp
        elif isinstance(element, ir.IntType):
            op = b.fptosi if signed else b.fptoui
        else:
            op = b.fptrunc if element_bytes(element) < element_bytes(source) else b.fpext
        return Value(self.k, op(self.ssa, target))

    def bits(self, type_: Any) -> Value:
        """Returns the same bits as another type of the same size."""
        return Value(self.k, self.k.builder.bitcast(self.ssa, type_))

    def lane(self, i: int | Value) -> Value:
        index = i.ssa if isinstance(i, Value) else I32(i)
        return Value(self.k, self.k.builder.extract_element(self.ssa, index))

    def with_lane(self, i: int, value: Value) -> Value:
        return Value(self.k, self.k.builder.insert_element(self.ssa, value.ssa, I32(i)))

    def shuffle(self, lanes: Sequence[int], other: Value | None = None) -> Value:
        """Picks lanes by constant index; indices past the first vector's count go into `other`."""
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        second = other.ssa if other is not None else ir.Constant(self.type, ir.Undefined)
        return Value(self.k, self.k.builder.shuffle_vector(self.ssa, second, mask))


class Ptr:
    """Typed memory: `p[i]`, `p[i] = v`, `p + i`, vectors with `load` and `store`. Vector access needs no alignment."""

    def __init__(self, k: Emitter, ssa: Any, element: Any) -> None:
        self.k, self.ssa, self.element = k, ssa, element

    def __add__(self, index: Value | int) -> Ptr:
        address = self.k.builder.gep(self.ssa, [self.k.index(index)], inbounds=True, source_etype=self.element)
        return Ptr(self.k, address, self.element)

    def load(self, index: Value | int = 0, count: int | None = None) -> Value:
        """Loads one element, or `count` neighbouring ones as a vector."""
        type_ = self.element if count is None else ir.VectorType(self.element, count)
        at = (self + index).ssa
        return Value(self.k, self.k.builder.load(at, align=element_bytes(self.element), typ=type_))

    def store(self, index: Value | int, value: Value) -> None:
        self.k.builder.store(value.ssa, (self + index).ssa, align=element_bytes(self.element))

    def __getitem__(self, index: Value | int) -> Value:
        return self.load(index)

    def __setitem__(self, index: Value | int, value: Value | float) -> None:
        self.store(index, value if isinstance(value, Value) else self.k.const(self.element, value))

    def as_(self, element: Any) -> Ptr:
        """Returns the same address, read as another element type."""
        return Ptr(self.k, self.ssa, element)

    def pointer_at(self, index: Value | int, element: Any) -> Ptr:
        """Loads the pointer stored at `index` of an array of pointers."""
        return Ptr(self.k, self.as_(POINTER).load(index).ssa, element)

    def function_at(self, index: Value | int, kind: ir.FunctionType) -> Any:
        """Loads the function stored at `index` of an array of pointers, to be given to `Emitter.builder.call`."""
        at = (self.as_(POINTER) + index).ssa
        return self.k.builder.load(at, typ=ir.PointerType(kind))  # llvmlite needs the function's type on the pointer

    def after(self, *values: Value) -> Ptr:
        """Returns the same address, hidden from LLVM, so that it places loads through it behind the vectors `values`.

        It keeps LLVM from merging equal loads and from hoisting all loads of an unrolled body to its top, where
        registers would run out. The machine itself does not wait: no instruction is emitted.
        """
        target = self.k.target
        register = {"x86_64": "v" if target.has("avx512f") else "x", "aarch64": "w", "arm64": "w"}
        letter, width = register.get(target.triple.split("-")[0]), target.register_bytes
        if letter is None:
            return self
        values = tuple(v for v in values if element_bytes(v.type) <= width)
        kind = ir.FunctionType(POINTER, [POINTER, *(v.type for v in values)])
        constraints, args = "=r,0" + f",{letter}" * len(values), [self.ssa, *(v.ssa for v in values)]
        return Ptr(self.k, self.k.builder.asm(kind, "", constraints, args, False), self.element)

    def prefetch(self, index: Value | int) -> None:
        """Asks for the cache line of an element, which need not be inside the buffer."""
        args = [(self + index).ssa, I32(0), I32(3), I32(1)]
        self.k.intrinsic("llvm.prefetch.p0", ir.VoidType(), args)


class Var:
    """A mutable local (a stack slot that LLVM turns into registers): read and assign `.v`."""

    def __init__(self, k: Emitter, initial: Value) -> None:
        self.k = k
        self.slot = k.entry_alloca(initial.type)
        self.type = initial.type
        self.v = initial

    @property
    def v(self) -> Value:
        return Value(self.k, self.k.builder.load(self.slot, typ=self.type))

    @v.setter
    def v(self, value: Value) -> None:
        self.k.builder.store(value.ssa, self.slot)
