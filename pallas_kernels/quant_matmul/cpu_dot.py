"""Dot products of bytes for every CPU: four unsigned bytes of each weight row times four signed ones, added in 32 bits."""

from __future__ import annotations

from llvmlite import ir

from pallas_kernels.cpu_ffi.emit import I16, I32, Emitter, Ptr, Value


def dot(k: Emitter, total: Value, weights: list[Value], digits: Ptr, most: int) -> Value:
    """Returns total[r] + the sum over vectors v and bytes i < 4 of weights[v][4 r + i] (unsigned) times digits[4 v + i]
    (signed).

    Sums wrap in 32 bits, nothing saturates.

    Args:
        total: int32, a number for each row.
        weights: bytes, four of each row; `most` is the largest.
    """
    rows = total.type.count
    if name := _vnni(k, rows):
        for v, column in enumerate(weights):
            x = _four(k, digits, v, column.type)
            total = Value(k, k.intrinsic(name, total.type, [total.ssa, column.ssa, x.ssa]))
        return total
    if k.target.has("dotprod") and rows == 4:
        return _sdot(k, total, weights, digits, most)
    if not has_bytes(k, 4 * rows):
        for v, column in enumerate(weights):
            words = column.bits(total.type)
            for i in range(4):
                total = total + (words >> 8 * i & 255) * digits[4 * v + i].to(I32)
        return total
    if most > 127:  # 16-bit sums of two products would saturate
        high = dot(k, k.zeros(I32, rows), [w >> 4 for w in weights], digits, 15)
        return dot(k, total, [w & 15 for w in weights], digits, 15) + (high << 4)
    together = 32767 // (most * 2 * 128)  # vectors whose sums fit 16 bits
    for start in range(0, len(weights), together):
        sums = None
        for v in range(start, min(start + together, len(weights))):
            products = multiply_add(k, weights[v], _four(k, digits, v, weights[v].type))
            sums = products if sums is None else sums + products
        assert sums is not None
        total = total + add_pairs(k, sums)
    return total


def _four(k: Emitter, digits: Ptr, number: int, type_: ir.VectorType) -> Value:
    """Returns the number-th four digits, again and again."""
    return k.splat(digits.as_(I32).load(number), type_.count // 4).bits(type_)


def _vnni(k: Emitter, rows: int) -> str | None:
    """Returns the name of vpdpbusd for so many rows, if there is one."""
    if rows == 16 and k.target.has("avx512vnni"):
        return "llvm.x86.avx512.vpdpbusd.512"
    vectors = k.target.has("avxvnni") or (k.target.has("avx512vnni") and k.target.has("avx512vl"))
    return "llvm.x86.avx512.vpdpbusd.256" if rows == 8 and vectors else None


def _sdot(k: Emitter, total: Value, weights: list[Value], digits: Ptr, most: int) -> Value:
    """Does it by arm64's product of signed bytes."""
    if most > 127:
        high = _sdot(k, k.zeros(I32, 4), [w >> 7 for w in weights], digits, 1)
        return _sdot(k, total, [w & 127 for w in weights], digits, 127) + (high << 7)
    for v, column in enumerate(weights):
        x = _four(k, digits, v, column.type)
        total = Value(k, k.intrinsic("llvm.aarch64.neon.sdot.v4i32.v16i8", total.type, [total.ssa, column.ssa, x.ssa]))
    return total


def multiply_add(k: Emitter, u: Value, s: Value) -> Value:
    """Multiplies unsigned with signed bytes and adds neighbouring products in 16 bits (which must hold them)."""
    count = u.type.count
    names = {16: "ssse3.pmadd.ub.sw.128", 32: "avx2.pmadd.ub.sw", 64: "avx512.pmaddubs.w.512"}
    if has_bytes(k, count):
        return Value(k, k.intrinsic(f"llvm.x86.{names[count]}", ir.VectorType(I16, count // 2), [u.ssa, s.ssa]))
    even, odd = range(0, count, 2), range(1, count, 2)
    u, s = u.to(I16, signed=False), s.to(I16)
    return u.shuffle(even) * s.shuffle(even) + u.shuffle(odd) * s.shuffle(odd)


def add_pairs(k: Emitter, x: Value) -> Value:
    """Adds neighbouring int16 as int32."""
    count = x.type.count
    names = {8: "sse2.pmadd.wd", 16: "avx2.pmadd.wd", 32: "avx512.pmaddw.d.512"}
    if has_bytes(k, 2 * count):
        ones = k.const(x.type, 1)
        return Value(k, k.intrinsic(f"llvm.x86.{names[count]}", ir.VectorType(I32, count // 2), [x.ssa, ones.ssa]))
    return x.shuffle(range(0, count, 2)).to(I32) + x.shuffle(range(1, count, 2)).to(I32)


def has_bytes(k: Emitter, count: int) -> bool:
    """Checks whether this is an x86 with byte multiplication on vectors of `count` bytes."""
    return "x86" in k.target.triple and k.target.has("avx512bw" if count == 64 else "avx2")
