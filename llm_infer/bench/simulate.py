"""Simulates how much of the KV memory holds tokens, with pages and with contiguous reservations, without any model.

Reproduces the picture of Kwon et al. 2023 ("Efficient Memory Management for Large Language Model Serving with
PagedAttention", figures 2 and 15) on synthetic lengths, with the allocator and the page tables that the engine uses.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llm_infer.kvcache.page_allocator import PageAllocator
from llm_infer.kvcache.page_table import PageTable

MEMORY = 16384  # tokens: the 13 GB that OPT-13B leaves of a 40 GB accelerator
LONGEST = 2048  # tokens of a sequence
PAGE_SIZE = 16


@dataclass(frozen=True)
class Workload:
    """Lognormal lengths in tokens, with the means of a data set and one coefficient of variation."""

    name: str
    prompt: float
    output: float
    cv: float = 0.7

    def draw(self, count: int, seed: int) -> list[tuple[int, int]]:
        """Returns `count` pairs (prompt length, output length), each at least 1 and together at most LONGEST."""
        random = np.random.default_rng(seed)
        sigma = math.sqrt(math.log(1 + self.cv**2))
        pairs = []
        while len(pairs) < count:
            prompt, output = (
                max(1, round(random.lognormal(math.log(mean) - sigma**2 / 2, sigma)))
                for mean in (self.prompt, self.output)
            )
            if prompt + output <= LONGEST:
                pairs.append((prompt, output))
        return pairs


SHAREGPT = Workload("ShareGPT", 161, 338)
ALPACA = Workload("Alpaca", 19, 58)


@dataclass(frozen=True)
class MemoryUse:
    """Averages over the time in which requests wait, so that memory is the limit.

    Attributes:
        method: the way in which memory is given to sequences.
        of_reserved: share of the reserved token slots that hold a token, in %.
        of_memory: share of all token slots that hold a token, in %.
        sequences: sequences that run at the same time.
        paper: `of_memory` in the paper's own experiment, in %.
    """

    method: str
    of_reserved: float
    of_memory: float
    sequences: float
    paper: float | None = None


@dataclass(frozen=True)
class Sharing:
    """Pages saved by parallel samples of one prompt, in % of the pages without sharing, averaged over time."""

    n: int
    measured: float
    closed_form: float
    paper: float


class _Mean:
    """Averages over steps: tokens that are held, slots that are reserved, sequences that run."""

    def __init__(self) -> None:
        self.steps, self.sums = 0, np.zeros(3)

    def add(self, used: int, reserved: int, running: int) -> None:
        self.steps += 1
        self.sums += (used, reserved, running)

    def result(self, method: str, paper: float | None) -> MemoryUse:
        used, reserved, running = self.sums
        share = 100 * used / (self.steps * MEMORY)
        return MemoryUse(method, float(100 * used / reserved), float(share), float(running / self.steps), paper)


class BuddyAllocator:
    """Contiguous blocks whose sizes are powers of two, split and merged in pairs (Knuth, TAOCP 1, §2.5)."""

    def __init__(self, size: int) -> None:
        self._free: dict[int, set[int]] = {1 << order: set() for order in range(size.bit_length())}
        self._free[size].add(0)
        self._size = size

    def allocate(self, size: int) -> tuple[int, int] | None:
        """Returns (start, block size ≥ size), or None if no block is large enough."""
        wanted = _power_of_two(size)
        block = wanted
        while block <= self._size and not self._free[block]:
            block *= 2
        if block > self._size:
            return None
        start = min(self._free[block])
        self._free[block].remove(start)
        while block > wanted:
            block //= 2
            self._free[block].add(start + block)
        return start, wanted

    def release(self, start: int, block: int) -> None:
        """Gives a block back and merges it with its free neighbour as often as possible."""
        while block < self._size and start ^ block in self._free[block]:
            self._free[block].remove(start ^ block)
            start, block = min(start, start ^ block), 2 * block
        self._free[block].add(start)


def simulate_contiguous(
    method: str, reserve: Callable[[int, int], int], lengths: list[tuple[int, int]], paper: float
) -> MemoryUse:
    """Simulates a queue in order of arrival: a sequence starts when a block for `reserve(prompt, output)` tokens is free.

    A running sequence gets one token per step; its block is given back with its last one.
    """
    memory, mean = BuddyAllocator(MEMORY), _Mean()
    waiting = deque(lengths)
    ends: list[tuple[int, int, int, int]] = []  # (step, start of block, size of block, tokens)
    step = used = reserved = 0
    saturated = False  # the first fill, in which all sequences are young, does not count
    while waiting:
        while ends and ends[0][0] == step:
            _, start, block, tokens = heapq.heappop(ends)
            memory.release(start, block)
            used, reserved, saturated = used - tokens, reserved - block, True
        while waiting:
            prompt, output = waiting[0]
            place = memory.allocate(reserve(prompt, output))
            if place is None:
                break
            waiting.popleft()
            used, reserved = used + prompt, reserved + place[1]
            heapq.heappush(ends, (step + output, *place, prompt + output))
        used += len(ends)
        step += 1
        if waiting and saturated:
            mean.add(used, reserved, len(ends))
    return mean.result(method, paper)


def simulate_paged(lengths: list[tuple[int, int]], paper: float) -> MemoryUse:
    """Simulates the same queue with pages on demand; a sequence that finds none preempts the youngest, which starts again
    later."""
    allocator, mean = PageAllocator(1 + MEMORY // PAGE_SIZE), _Mean()
    waiting = deque((prompt, prompt + output) for prompt, output in lengths)  # (tokens so far, tokens in the end)
    running: list[tuple[PageTable, int]] = []
    saturated = False
    while waiting:
        # As in the scheduler, a page for each sequence to grow stays free.
        while waiting and -(-waiting[0][0] // PAGE_SIZE) + len(running) <= allocator.num_free(0):
            tokens, final = waiting.popleft()
            table = PageTable(allocator, 0, PAGE_SIZE)
            table.append(tokens)
            running.append((table, final))
        for table, _ in tuple(running):
            while table.pages and table.pages_needed(1) > allocator.num_free(0):
                victim, final = running.pop()
                waiting.appendleft((victim.length, final))
                victim.free()
            if table.pages:
                table.append(1)
        if waiting and saturated:
            used = sum(table.length for table, _ in running)
            mean.add(used, (allocator.num_usable - allocator.num_free(0)) * PAGE_SIZE, len(running))
        for table, final in running:
            if table.length == final:
                table.free()
                saturated = True
        running = [(table, final) for table, final in running if table.pages]
    return mean.result(f"pages of {PAGE_SIZE}", paper)


def memory_use(count: int = 600, seed: int = 0) -> list[MemoryUse]:
    """Returns the rows of the first table. The contiguous policies are those of Orca as the paper rebuilt it, on a buddy
    allocator.

    Its rounding matters: blocks of exactly the final length would hold tokens in 62 % of their slots (the others wait
    for tokens to come), less what fragmentation between blocks of all sizes would cost.
    """
    lengths = SHAREGPT.draw(count, seed)
    return [
        simulate_contiguous("contiguous, maximum", lambda prompt, output: LONGEST, lengths, 20.4),
        simulate_contiguous(
            "contiguous, power of two", lambda prompt, output: prompt + _power_of_two(output), lengths, 26.8
        ),
        simulate_contiguous("contiguous, oracle", lambda prompt, output: prompt + output, lengths, 38.2),
        simulate_paged(lengths, 96.3),
    ]


def sharing(n: int, paper: float, count: int = 100, seed: int = 0) -> Sharing:
    """Runs `count` requests of n samples, each sample with an output length of its own, one request after another."""
    lengths = ALPACA.draw(count * n, seed)
    allocator = PageAllocator(1 + n * LONGEST // PAGE_SIZE)
    shared = alone = 0
    saved_form = alone_form = 0
    for index in range(count):
        prompt = lengths[index * n][0]
        outputs = [output for _, output in lengths[index * n : (index + 1) * n]]
        first = PageTable(allocator, 0, PAGE_SIZE)
        first.append(prompt)
        tables = [first, *(first.fork(prompt - 1) for _ in range(n - 1))]
        for table in tables[1:]:
            table.append(1)
        for step in range(1, max(outputs) + 1):
            live = [table for table, output in zip(tables, outputs, strict=True) if step <= output]
            for table in live:
                table.append(1)
            shared += allocator.num_usable - allocator.num_free(0)
            alone += sum(len(table.pages) for table in live)
            for table, output in zip(tables, outputs, strict=True):
                if step == output:
                    table.free()
        # Pages full of prompt tokens before the last are shared; while k samples live, that saves k - 1 times as many.
        saved_form += (sum(outputs) - max(outputs)) * ((prompt - 1) // PAGE_SIZE)
        alone_form += sum(_pages_over_time(prompt, output) for output in outputs)
    return Sharing(n, 100 * (1 - shared / alone), 100 * saved_form / alone_form, paper)


def table() -> str:
    """Returns both tables as text."""
    lines = [
        f"KV memory of {MEMORY} tokens, lengths like {SHAREGPT.name} "
        f"(means {SHAREGPT.prompt:g} in, {SHAREGPT.output:g} out, cv {SHAREGPT.cv:g})",
        f"{'':26}{'tokens/reserved':>16}{'tokens/memory':>15}{'sequences':>11}{'paper':>8}",
    ]
    lines += [
        f"{row.method:26}{row.of_reserved:>14.1f} %{row.of_memory:>13.1f} %{row.sequences:>11.1f}{row.paper:>6.1f} %"
        for row in memory_use()
    ]
    lines += [
        "",
        f"Pages saved by parallel samples, lengths like {ALPACA.name} "
        f"(means {ALPACA.prompt:g} in, {ALPACA.output:g} out, cv {ALPACA.cv:g})",
        f"{'':26}{'measured':>16}{'closed form':>15}{'paper':>19}",
    ]
    for n, paper in ((2, 6.1), (4, 8.5), (6, 9.8)):
        row = sharing(n, paper)
        lines.append(f"{f'n = {n}':26}{row.measured:>14.1f} %{row.closed_form:>13.1f} %{row.paper:>17.1f} %")
    return "\n".join(lines)


def _pages_over_time(prompt: int, output: int) -> int:
    """Returns the sum of ceil((prompt + t) / PAGE_SIZE) over t = 1 … output, in closed form."""

    def upto(tokens: int) -> int:  # the same sum from 1 token on
        full, rest = divmod(tokens, PAGE_SIZE)
        return PAGE_SIZE * full * (full + 1) // 2 + rest * (full + 1)

    return upto(prompt + output) - upto(prompt)


def _power_of_two(size: int) -> int:
    """Returns the smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()
