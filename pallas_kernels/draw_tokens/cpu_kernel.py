"""The draw of one row as native code: bisections find thresholds and skip blocks of tokens that are too unlikely.

A token's cost is how far its logit, divided by the temperature, is below the largest: cost >= 0, and its mass is exp(-cost).
The bits of non-negative floats are ordered like the floats, so a threshold is an int32 that some thirty comparisons find. Top-k,
top-p and min-p each keep the tokens up to a cost; typical-p those whose cost is near the mean cost.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from pallas_kernels.cpu_ffi.bridge import Frame
from pallas_kernels.cpu_ffi.emit import F32, F64, I32, I64, Emitter, Ptr, Value, Var
from pallas_kernels.draw_tokens.limits import ALL_BITS, CANDIDATES, FINITE, SMALLEST, WEIGHTLESS

BLOCK = 128


def body(k: Emitter, a: Frame) -> None:
    """Emits the kernel: `ids` [S]; `lowest` [S, B], the lowest cost in each block, and `masses` [S, B] are for its own use."""
    a.parallel(a.S, lambda k, a, row: Row(k, a, row).draw())


class Row:
    """One row of logits."""

    def __init__(self, k: Emitter, a: Frame, row: Value) -> None:
        self.k, self.a, self.row, self.blocks = k, a, row, a.B
        self.logits: Ptr = a.logits + row * a.V
        self.lowest: Ptr = a.lowest + row * a.B
        self.masses: Ptr = a.masses + row * a.B
        self.temperature, self.id = a.temperature[row], k.var(k.const(I32, 0))

    def draw(self) -> None:
        """Draws the row's id. If a logit is NaN, or all are -inf, it is some id of the vocabulary; inf is drawn as if greedy."""
        k, a = self.k, self.a
        largest = self._largest()
        self.id.v = self._first_equal(largest)
        sampled = (self.temperature >= SMALLEST) & (largest > float("-inf")) & (largest < float("inf"))
        with k.when(sampled):
            self.largest = largest
            with k.range(0, self.blocks) as b:
                self.lowest[b] = self.cost(self.lowest[b])
            self._draw_within(*self._limit())
        a.ids[self.row] = self.id.v

    def _block(self, b: Value, visit: Callable[[Value, Value], None]) -> None:
        """Calls `visit(place, x)` for vectors of a block's logits, then one by one for those that do not fill a vector."""
        k, lanes = self.k, self.k.lanes
        begin, end = b * BLOCK, k.min((b + 1) * BLOCK, self.a.V)
        whole = begin + (end - begin) // lanes * lanes
        with k.range(begin, whole, lanes) as i:
            visit(i, self.logits.load(i, lanes))
        with k.range(whole, end) as i:
            visit(i, self.logits[i])

    def _sum(self, b: Value, of: Callable[[Value], Value]) -> Value:
        """Returns the sum over a block of a function of the cost, float64."""
        k, lanes = self.k, self.k.lanes
        vector, rest = k.var(k.zeros(F32, lanes)), k.var(k.const(F32, 0.0))

        def visit(_: Value, x: Value) -> None:
            value, sum_ = of(self.cost(x)), vector if isinstance(x.type, ir.VectorType) else rest
            sum_.v = sum_.v + value

        self._block(b, visit)
        return (k.sum_lanes(vector.v) + rest.v).to(F64)

    def cost(self, x: Value) -> Value:
        """Returns the cost of logits."""
        largest, temperature = self.k.match(x, self.largest)[1], self.k.match(x, self.temperature)[1]
        return (largest - x) / temperature

    def _largest(self) -> Value:
        """Returns the largest logit; `lowest` then has that of each block."""
        k, lanes = self.k, self.k.lanes
        largest = k.var(k.const(F32, float("-inf")))
        with k.range(0, self.blocks) as b:
            vector, rest = k.var(k.const(ir.VectorType(F32, lanes), float("-inf"))), k.var(k.const(F32, float("-inf")))

            def visit(_: Value, x: Value, vector: Var = vector, rest: Var = rest) -> None:
                best = vector if isinstance(x.type, ir.VectorType) else rest
                best.v = k.max(x, best.v)

            self._block(b, visit)
            self.lowest[b] = k.max(k.max_lanes(vector.v), rest.v)
            largest.v = k.max(self.lowest[b], largest.v)
        return largest.v

    def _first_equal(self, largest: Value) -> Value:
        """Returns the first token with this logit; 0 where none has it."""
        k = self.k
        b, i, found = k.var(k.i64(0)), k.var(k.i64(0)), k.var(k.const(I32, 0))
        with k.loop_while() as go_on:
            go_on(b.v < self.blocks)
            go_on(self.lowest[b.v].ne(largest))
            b.v = b.v + 1
        with k.when(b.v < self.blocks):
            i.v = b.v * BLOCK
            with k.loop_while() as go_on:
                go_on(self.logits[i.v].ne(largest))
                i.v = i.v + 1
            found.v = i.v.to(I32)
        return found.v

    # thresholds
    def _bits(self, x: Value) -> Value:
        """Returns the bits of non-negative floats as int32, which have the same order."""
        return x.bits(ir.VectorType(I32, x.type.count) if isinstance(x.type, ir.VectorType) else I32)

    def _mass(self, cost: Value) -> Value:
        return self.k.exp(cost * -1.0)

    def _where(self, condition: Value, value: Value) -> Value:
        return self.k.select(condition, value, self.k.like(value, 0.0))

    def _total(self, limit: Value, of: Callable[[Value], Value], enough: Value | None = None) -> Value:
        """Returns the float64 sum of a function of the cost over blocks with a token up to `limit`; may end once it is
        `enough`."""
        k = self.k
        total, b = k.var(k.const(F64, 0.0)), k.var(k.i64(0))
        with k.loop_while() as go_on:
            go_on(b.v < self.blocks)
            if enough is not None:
                go_on(total.v < enough)
            with k.when(self._bits(self.lowest[b.v]) <= limit):
                total.v = total.v + self._sum(b.v, of)
            b.v = b.v + 1
        return total.v

    def _smallest(self, most: Value, reached: Callable[[Value], Value]) -> Value:
        """Returns the smallest int32 from 0 on at which `reached` is true; it is at `most`, and stays so once it is."""
        k = self.k
        low, high = k.var(k.const(I32, 0)), k.var(most)
        with k.loop_while() as go_on:
            go_on(low.v < high.v)
            middle = low.v + ((high.v - low.v) >> 1)
            with k.when_else(reached(middle)) as (yes, no):
                with yes:
                    high.v = middle
                with no:
                    low.v = middle + 1
        return high.v

    def _limit(self) -> tuple[Value, Value, Value, Value]:
        """Returns the bits of the highest kept cost, whether few are kept, and with typical-p a cost and the distance from it."""
        k, a = self.k, self.a
        top_k, top_p, typical_p = a.top_k[self.row], a.top_p[self.row], a.typical_p[self.row]
        limit = k.var(k.const(I32, FINITE))

        def count_to(bound: Value) -> Callable[[Value], Value]:
            return lambda cost: self._where(self._bits(cost) <= bound, k.like(cost, 1.0))

        def mass_to(bound: Value) -> Callable[[Value], Value]:
            return lambda cost: self._where(self._bits(cost) <= bound, self._mass(cost))

        with k.when((top_k > 0) & (top_k.to(I64) < a.V)):
            count = top_k.to(F64)
            limit.v = self._smallest(limit.v, lambda bound: self._total(bound, count_to(bound), count) >= count)
        with k.when(top_p < 1.0):
            share = top_p.to(F64) * self._total(limit.v, mass_to(limit.v))
            most = k.min(limit.v, k.const(I32, WEIGHTLESS))
            limit.v = self._smallest(most, lambda bound: self._total(bound, mass_to(bound), share) >= share)
        limit.v = k.min(limit.v, self._bits(a.highest[self.row]))
        few = k.min(a.V, k.i64(CANDIDATES)).to(F64)
        is_few = self._total(limit.v, count_to(limit.v), few) < few

        mean, distance = k.var(k.const(F32, 0.0)), k.var(k.const(I32, ALL_BITS))
        with k.when(typical_p < 1.0):
            # A token's information is its cost plus a number that is the same for all, so it is as far from the entropy as
            # its cost is from the mean cost (locally typical sampling, Meister et al., 2023).
            whole = mass_to(limit.v)
            total = self._total(limit.v, whole)

            def weighted(cost: Value) -> Value:
                mass = whole(cost)
                return self._where(mass > 0.0, mass * cost)

            mean.v = (self._total(limit.v, weighted) / total).to(F32)
            share = typical_p.to(F64) * total

            def reached(bound: Value) -> Value:
                def near(cost: Value) -> Value:
                    return self._where(self._bits(k.abs(cost - mean.v)) <= bound, whole(cost))

                furthest = (mean.v + bound.bits(F32)) * 1.00001  # plus what rounding may add
                return self._total(k.min(limit.v, self._bits(furthest)), near, share) >= share

            distance.v = self._smallest(k.const(I32, WEIGHTLESS), reached)
        return limit.v, is_few, mean.v, distance.v

    # the draw
    def _draw_within(self, limit: Value, is_few: Value, mean: Value, distance: Value) -> None:
        """Sets the id to the kept token at which the cumulative distribution passes the uniform number."""
        k = self.k

        def kept(cost: Value) -> Value:
            return (self._bits(cost) <= limit) & (self._bits(k.abs(cost - mean)) <= distance)

        with k.when_else(is_few) as (yes, no):
            with yes:
                self._draw_among_few(limit, kept)
            with no:
                self._draw_in_order(limit, kept)

    def _draw_among_few(self, limit: Value, kept: Callable[[Value], Value]) -> None:
        """Draws in the order of the tokens' cost, which an insertion sort makes."""
        k = self.k
        costs, ids, count = k.scratch(F32, CANDIDATES), k.scratch(I32, CANDIDATES), k.var(k.i64(0))
        with k.range(0, self.blocks) as b, k.when(self._bits(self.lowest[b]) <= limit):
            with k.range(b * BLOCK, k.min((b + 1) * BLOCK, self.a.V)) as i:
                cost = self.cost(self.logits[i])
                with k.when(kept(cost) & (count.v < CANDIDATES)):
                    at = k.var(count.v)
                    with k.loop_while() as go_on:
                        go_on(at.v > 0)
                        go_on(costs[at.v - 1] > cost)
                        costs[at.v], ids[at.v] = costs[at.v - 1], ids[at.v - 1]
                        at.v = at.v - 1
                    costs[at.v], ids[at.v] = cost, i.to(I32)
                    count.v = count.v + 1
        total = k.var(k.const(F64, 0.0))
        with k.range(0, count.v) as i:
            total.v = total.v + self._mass(costs[i]).to(F64)
        target = self.a.uniform[self.row].to(F64) * total.v
        place, _ = self._pass(count.v, target, lambda i: self._mass(costs[i]))
        with k.when(total.v > 0.0):
            self.id.v = ids[place]

    def _draw_in_order(self, limit: Value, kept: Callable[[Value], Value]) -> None:
        """Draws in the order of the vocabulary: first the block, then the token in it."""
        k = self.k
        total = k.var(k.const(F64, 0.0))

        def mass(cost: Value) -> Value:
            return self._where(kept(cost), self._mass(cost))

        with k.range(0, self.blocks) as b:
            self.masses[b] = 0.0
            with k.when(self._bits(self.lowest[b]) <= limit):
                self.masses[b] = self._sum(b, mass).to(F32)
            total.v = total.v + self.masses[b].to(F64)
        block, before = self._pass(self.blocks, self.a.uniform[self.row].to(F64) * total.v, lambda b: self.masses[b])
        target = self.a.uniform[self.row].to(F64) * total.v - before
        begin = block * BLOCK
        count = k.min(self.a.V - begin, k.i64(BLOCK))
        place, _ = self._pass(count, target, lambda i: mass(self.cost(self.logits[begin + i])))
        with k.when(total.v > 0.0):
            self.id.v = (begin + place).to(I32)

    def _pass(self, count: Value, target: Value, mass: Callable[[Value], Value]) -> tuple[Value, Value]:
        """Returns the first of `count` entries at which the sum of masses exceeds the target, or the last that has a mass (the
        target may lie at the very end), and the sum before it."""
        k = self.k
        i, place = k.var(k.i64(0)), k.var(k.i64(0))
        total, before = k.var(k.const(F64, 0.0)), k.var(k.const(F64, 0.0))
        with k.loop_while() as go_on:
            go_on(i.v < count)
            go_on(total.v <= target)
            here = mass(i.v)
            with k.when(here > 0.0):
                place.v, before.v = i.v, total.v
                total.v = total.v + here.to(F64)
            i.v = i.v + 1
        return place.v, before.v
