"""The work list of one step of ragged paged attention, planned on the host in numpy (no jax here).

The list says which query rows attend to which run of pages. It is built once per step from the step's real lengths and
serves every layer and every backend: the CPU loop, the TPU's SMEM loop and the GPU's thread blocks walk the same items.
Axis letters: T tokens in the step, S sequences, B pages per block table, N work items, C page size in tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

ITEM_COLUMNS = 5  # sequence, first row, row count, first page index in the block table, page count


class AttentionPlan(NamedTuple):
    """The device side of a plan: int32 arrays, one data-parallel shard's view (a pytree, without a `dp` axis).

    Shapes:
        block_tables: [S, B] page ids in the order of the tokens; unused entries are 0, the null page.
        q_start: [S+1] first token row of each sequence. Rows of a sequence are contiguous, rows of all sequences are
            packed from row 0, and rows from q_start[S] on are padding. An unused sequence has an empty range.
        kv_len: [S] tokens in the sequence, those written in this step included.
        write_slot: [T] page * C + offset at which a row's new K and V go; 0 (in the null page) for padding rows.
        items: [N, 5] (sequence, first row, row count, first page index in the block table, page count).
            One-row items come first, the others (2 ... `q_block` rows) after them; entries past counts[1] are 0.
        counts: [2] (number of one-row items, number of items): dynamic loop bounds.

    Row r of sequence s has position kv_len[s] - (q_start[s+1] - q_start[s]) + (r - q_start[s]). Each row is in exactly
    one item, and the item's run of pages holds every key that one of its rows may see.
    """

    block_tables: Any
    q_start: Any
    kv_len: Any
    write_slot: Any
    items: Any
    counts: Any

    @property
    def q_block(self) -> int:
        """The most rows that an item may have: static, recovered from the array shapes (see PlanShape.q_rows)."""
        num_tokens = self.write_slot.shape[0]
        blocks = self.items.shape[0] - self.block_tables.shape[0]
        return -(-num_tokens // blocks)


@dataclass(frozen=True)
class PlanShape:
    """The static sizes of a plan. Only `tokens` is bucketed, so programs do not multiply.

    Args:
        tokens: T, rows of the step (the bucket).
        sequences: S, most sequences in the step.
        pages_per_seq: B, length of a block table.
        q_block: wanted rows per work item; `q_rows` is the number used.
    """

    tokens: int
    sequences: int
    pages_per_seq: int
    q_block: int

    def __post_init__(self) -> None:
        for name in ("tokens", "sequences", "pages_per_seq", "q_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"PlanShape.{name} is {getattr(self, name)}, expected at least 1")

    @property
    def q_rows(self) -> int:
        """The rows per work item: `q_block`, evened out over T so that T and N alone determine it.

        With n = ceil(T / q_block), this is ceil(T / n) <= q_block. Kernels read it as AttentionPlan.q_block.
        """
        blocks = -(-self.tokens // self.q_block)
        return -(-self.tokens // blocks)

    @property
    def num_items(self) -> int:
        """The number of items, N = S + ceil(T / q_block), enough for every batch.

        Proof: a sequence with r >= 1 rows has ceil(r / b) <= 1 + (r - 1) / b items (b = q_rows), so all of them have
        at most S + T / b. And T / b <= ceil(T / q_block), because b = ceil(T / n) >= T / n with n = ceil(T / q_block).
        """
        return self.sequences + -(-self.tokens // self.q_block)


def plan_fields(shape: PlanShape) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of each int32 array of an AttentionPlan, in the order in which they are packed."""
    return {
        "block_tables": (shape.sequences, shape.pages_per_seq),
        "q_start": (shape.sequences + 1,),
        "kv_len": (shape.sequences,),
        "write_slot": (shape.tokens,),
        "items": (shape.num_items, ITEM_COLUMNS),
        "counts": (2,),
    }


def fill_plan(
    shape: PlanShape,
    out: Mapping[str, np.ndarray],
    q_len: Sequence[int] | np.ndarray,
    kv_len: Sequence[int] | np.ndarray,
    tables: np.ndarray | Sequence[Sequence[int]],
    page_size: int,
    window: int | None = None,
) -> None:
    """Writes the plan of one step into preallocated arrays; every entry of `out` is set.

    Args:
        shape: the static sizes.
        out: one int32 array (a view will do) per entry of `plan_fields(shape)`.
        q_len: rows of each of the n <= S sequences in this step; 0 is allowed and makes no item.
        kv_len: tokens of each sequence, this step's included.
        tables: page ids of each sequence. Lists may have any length up to B. The fastest is the array
            `out["block_tables"]` itself, already filled by the caller (unused entries 0): it is then not touched.
        page_size: C, tokens.
        window: tokens that a row may see, itself included, if *every* layer has this window: page runs then start at the
            first visible page. None covers all layers.

    Raises:
        ValueError: there are more tokens, sequences or pages than `shape` has room for, kv_len < q_len, window < 1, or a row
            has the null page as its page (its block table entry was not set).
    """
    q_len, kv_len = np.asarray(q_len, np.int32), np.asarray(kv_len, np.int32)
    n = len(q_len)
    if len(kv_len) != n or len(tables) < n:
        raise ValueError(f"q_len has {n} sequences, kv_len {len(kv_len)}, tables {len(tables)}: expected the same")
    if n > shape.sequences:
        raise ValueError(f"{n} sequences in a plan for {shape.sequences}")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, expected at least 1 (the row itself) or None")
    seqs = np.arange(n, dtype=np.int32)

    q_start = out["q_start"]
    q_start[0] = 0
    np.cumsum(q_len, out=q_start[1 : n + 1])
    total = int(q_start[n])
    q_start[n + 1 :] = total
    if total > shape.tokens:
        raise ValueError(f"{total} tokens in a plan for {shape.tokens}")
    out["kv_len"][:n] = kv_len
    out["kv_len"][n:] = 0
    context = kv_len - q_len  # tokens that were there before this step = position of the first row
    if n and (int(q_len.min()) < 0 or int(context.min()) < 0):
        raise ValueError(f"expected 0 <= q_len <= kv_len, found q_len={q_len.tolist()}, kv_len={kv_len.tolist()}")
    if n and int(kv_len.max()) > shape.pages_per_seq * page_size:
        raise ValueError(
            f"a sequence of {int(kv_len.max())} tokens does not fit {shape.pages_per_seq} pages of {page_size}"
        )
    _fill_tables(out["block_tables"], tables, n)

    one_row_each = total == n and int(q_len.max(initial=0)) == 1  # the steady state: plain decode
    row_seq = seqs if one_row_each else np.repeat(seqs, q_len)
    position = context if one_row_each else (context - q_start[:n])[row_seq] + np.arange(total, dtype=np.int32)
    page_index, offset = np.divmod(position, page_size)
    slots = out["block_tables"][row_seq, page_index]
    slots *= page_size
    slots += offset
    if total and int(slots.min()) < page_size:
        row = int(slots.argmin())
        raise ValueError(
            f"row {row} (sequence {int(row_seq[row])}, position {int(position[row])}) would be written to the null "
            "page: its block table entry is 0"
        )
    out["write_slot"][:total] = slots
    out["write_slot"][total:] = 0

    items = out["items"]
    if one_row_each:
        num_items = num_single = n
        seq, first_row, num_rows, first_position, last_page = seqs, q_start[:n], 1, position, page_index
    else:
        blocks = -(-q_len // shape.q_rows)  # items of each sequence
        num_items = int(blocks.sum())
        seq = np.repeat(seqs, blocks)
        block_in_seq = np.arange(num_items, dtype=np.int32) - (np.cumsum(blocks) - blocks)[seq]
        skipped = block_in_seq * shape.q_rows
        num_rows = np.minimum(q_len[seq] - skipped, shape.q_rows)
        order = np.argsort(num_rows != 1, kind="stable")
        num_single = int(np.count_nonzero(num_rows == 1))
        seq, skipped, num_rows = seq[order], skipped[order], num_rows[order]
        first_row = q_start[seq] + skipped
        first_position = context[seq] + skipped
        last_page = (first_position + num_rows - 1) // page_size
    first_page = 0 if window is None else np.maximum(first_position - (window - 1), 0) // page_size
    used = items[:num_items]
    used[:, 0] = seq
    used[:, 1] = first_row
    used[:, 2] = num_rows
    used[:, 3] = first_page
    used[:, 4] = last_page - first_page + 1
    items[num_items:] = 0
    out["counts"][0] = num_single
    out["counts"][1] = num_items


def check_plan(plan: AttentionPlan, num_pages: int, page_size: int) -> None:
    """Raises ValueError for the first array of a plan that points outside the pool or contradicts another (host, numpy).

    Args:
        plan: the plan, of numpy arrays.
        num_pages: P.
        page_size: C, tokens.
    """
    tables, q_start, kv_len, write_slot, items, counts = (np.asarray(array) for array in plan)

    def refuse(name: str, at: str, found: int, least: int, most: int) -> None:
        raise ValueError(f"plan.{name}: {at} is {found}, expected {least} … {most}")

    sequences, per_sequence = tables.shape
    outside = np.argwhere((tables < 0) | (tables >= num_pages))
    if len(outside):
        seq, index = map(int, outside[0])
        refuse("block_tables", f"page {index} of sequence {seq}", int(tables[seq, index]), 0, num_pages - 1)
    q_len = np.diff(q_start)
    if q_start[0] != 0 or (q_len < 0).any() or q_start[-1] > len(write_slot):
        raise ValueError(
            f"plan.q_start: expected to rise from 0 to at most T={len(write_slot)}, found {q_start.tolist()}"
        )
    for seq in range(sequences):
        if not q_len[seq] <= kv_len[seq] <= per_sequence * page_size:
            most = per_sequence * page_size
            refuse("kv_len", f"sequence {seq}", int(kv_len[seq]), int(q_len[seq]), most)
    for row, slot in enumerate(write_slot):
        if not 0 <= slot < num_pages * page_size:
            refuse("write_slot", f"row {row}", int(slot), 0, num_pages * page_size - 1)
    if not 0 <= counts[0] <= counts[1] <= len(items):
        raise ValueError(
            f"plan.counts: expected 0 <= one-row items <= items <= N={len(items)}, found {counts.tolist()}"
        )
    for number, (seq, first, rows, page, pages) in enumerate(items[: counts[1]].tolist()):
        if not 0 <= seq < sequences:
            refuse("items", f"the sequence of item {number}", seq, 0, sequences - 1)
        if not (rows >= 1 and q_start[seq] <= first and first + rows <= q_start[seq + 1]):
            raise ValueError(
                f"plan.items: item {number} has rows {first} … {first + rows - 1}, not rows of sequence {seq}"
            )
        if not 0 <= page < page + pages <= per_sequence:
            raise ValueError(f"plan.items: item {number} has pages {page} … {page + pages - 1} of {per_sequence}")


def _fill_tables(target: np.ndarray, tables: np.ndarray | Sequence[Sequence[int]], n: int) -> None:
    """Puts the first n block tables into target [S, B], zero elsewhere; does nothing where they are the same memory."""
    if isinstance(tables, np.ndarray):
        same_memory = tables.__array_interface__["data"][0] == target.__array_interface__["data"][0]
        if same_memory and tables.strides == target.strides:
            return
        target[:] = 0
        width = min(tables.shape[1], target.shape[1])
        if tables.shape[1] > width and tables[:n, width:].any():
            raise ValueError(f"block tables of {tables.shape[1]} pages in a plan for {width}")
        target[:n, :width] = tables[:n, :width]
        return
    target[:] = 0
    for row, table in enumerate(tables[:n]):
        if len(table) > target.shape[1]:
            raise ValueError(f"a block table of {len(table)} pages in a plan for {target.shape[1]}")
        target[row, : len(table)] = table
