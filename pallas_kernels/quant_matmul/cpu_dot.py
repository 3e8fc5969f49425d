"""Dot products of bytes for every CPU: four unsigned bytes of each weight row times four signed ones, added in 32 bits."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Protocol

from llvmlite import ir

from pallas_kernels.cpu_ffi.emit import I16, I32, Emitter, Ptr, Value


class View(Protocol):
    """What weights are read through."""

    block: Ptr


Columns = Iterator[list[Value]]
"""Vectors of four weights of each row, for one column of a tile after the other; each is read when it is asked for."""


def by_pairs(k: Emitter, rows: int) -> bool:
    """Checks whether products of bytes come as 16-bit sums of pairs, so that `pair_sums` is the way to compute them."""
    return not _vnni(k, rows) and not _has_sdot(k, rows) and has_bytes(k, 4 * rows)


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
    if _has_sdot(k, rows):
        return _sdot(k, total, weights, digits, most)
    for v, column in enumerate(weights):
        words = column.bits(total.type)
        for i in range(4):
            total = total + (words >> 8 * i & 255) * digits[4 * v + i].to(I32)
    return total


def pair_sums(
    k: Emitter, columns: Columns, count: int, first: int, places: Sequence[Ptr], most: int, views: Sequence[View]
) -> list[list[Value]]:
    """Returns [vector][place]: int32 sums over `count` columns of weights times the digits at a place, from its column `first`.

    A column is unpacked once for all places. So are few registers needed: a sum for each vector and place, in 16 bits as long
    as they hold it.

    Args:
        most: the largest byte of a weight, at most 127.
        views: of the columns; each column is read after the products of the one before.
    """
    together = min(count, 32767 // (most * 2 * 128))  # columns whose sums fit 16 bits
    totals: list[list[Value]] = []
    for start in range(first, first + count, together):
        numbers = range(start, min(start + together, first + count))
        sums = _outer(k, columns, numbers, places, views) if together == count else _inner(k, columns, numbers, places)
        if not totals:
            totals = [[add_pairs(k, s) for s in of_vector] for of_vector in sums]
        else:
            totals = [
                [total + add_pairs(k, s) for total, s in zip(old, new, strict=True)]
                for old, new in zip(totals, sums, strict=True)
            ]
        if together < count:
            _read_after(views, [total for of_vector in totals for total in of_vector])
    return totals


def word_sums(
    k: Emitter, columns: Columns, count: int, first: int, places: Sequence[Ptr], views: Sequence[View]
) -> list[list[Value]]:
    """Returns the same for weights of up to 255 and digits of 16 bits, whose sums of two need 32 bits."""
    totals: list[list[Value]] = []
    for number in range(first, first + count):
        column = next(columns)
        words = [c.bits(ir.VectorType(I16, c.type.count // 2)) for c in column]
        halves = [(w & 255, w >> 8) for w in words]  # bytes 0 and 2 of each four, then 1 and 3
        new: list[list[Value]] = [[] for _ in column]
        for p, place in enumerate(places):
            x = [_four(k, place, 2 * number + i, column[0].type).bits(words[0].type) for i in range(2)]
            for v, parts in enumerate(halves):
                products = functools.reduce(
                    lambda a, b: a + b, [multiply_words(k, w, y) for w, y in zip(parts, x, strict=True)]
                )
                new[v].append(totals[v][p] + products if totals else products)
        totals = new
        _read_after(views, [total for of_vector in totals for total in of_vector])
    return totals


def _outer(
    k: Emitter, columns: Columns, numbers: range, places: Sequence[Ptr], views: Sequence[View]
) -> list[list[Value]]:
    """Returns 16-bit sums [vector][place], column by column."""
    sums: list[list[Value]] = []
    for number in numbers:
        column = next(columns)
        new: list[list[Value]] = [[] for _ in column]
        for p, place in enumerate(places):
            x = _four(k, place, number, column[0].type)
            for v, weights in enumerate(column):
                products = multiply_add(k, weights, x)
                new[v].append(sums[v][p] + products if sums else products)
        sums = new
        _read_after(views, [s for of_vector in sums for s in of_vector])
    return sums


def _inner(k: Emitter, columns: Columns, numbers: range, places: Sequence[Ptr]) -> list[list[Value]]:
    """Returns 16-bit sums [vector][place], place by place: few columns stay in registers."""
    taken = [next(columns) for _ in numbers]
    sums: list[list[Value]] = [[] for _ in taken[0]]
    for place in places:
        digits = [_four(k, place, number, taken[0][0].type) for number in numbers]
        for v, of_vector in enumerate(sums):
            products = [multiply_add(k, column[v], x) for column, x in zip(taken, digits, strict=True)]
            of_vector.append(functools.reduce(lambda a, b: a + b, products))
    return sums


def _read_after(views: Sequence[View], values: list[Value]) -> None:
    for view in views:
        view.block = view.block.after(*values)


def _four(k: Emitter, digits: Ptr, number: int, type_: ir.VectorType) -> Value:
    """Returns the number-th four digits, again and again."""
    return k.splat(digits.as_(I32).load(number), type_.count // 4).bits(type_)


def _vnni(k: Emitter, rows: int) -> str | None:
    """Returns the name of vpdpbusd for so many rows, if there is one."""
    if rows == 16 and k.target.has("avx512vnni"):
        return "llvm.x86.avx512.vpdpbusd.512"
    vectors = k.target.has("avxvnni") or (k.target.has("avx512vnni") and k.target.has("avx512vl"))
    return "llvm.x86.avx512.vpdpbusd.256" if rows == 8 and vectors else None


def _has_sdot(k: Emitter, rows: int) -> bool:
    return k.target.has("dotprod") and rows == 4


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
    return multiply_words(k, x, k.const(x.type, 1))


def multiply_words(k: Emitter, a: Value, b: Value) -> Value:
    """Multiplies int16 and adds neighbouring products, as int32."""
    count = a.type.count
    names = {8: "sse2.pmadd.wd", 16: "avx2.pmadd.wd", 32: "avx512.pmaddw.d.512"}
    if has_bytes(k, 2 * count):
        return Value(k, k.intrinsic(f"llvm.x86.{names[count]}", ir.VectorType(I32, count // 2), [a.ssa, b.ssa]))
    even, odd = range(0, count, 2), range(1, count, 2)
    return a.shuffle(even).to(I32) * b.shuffle(even).to(I32) + a.shuffle(odd).to(I32) * b.shuffle(odd).to(I32)


def has_bytes(k: Emitter, count: int) -> bool:
    """Checks whether this is an x86 with byte multiplication on vectors of `count` bytes."""
    return "x86" in k.target.triple and k.target.has("avx512bw" if count == 64 else "avx2")
