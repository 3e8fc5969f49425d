"""Block sizes of the GPU attention kernels: those measured on this kind of device, else by a rule of thumb."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pallas_kernels import tuned
from pallas_kernels.gpu_devices import STREAMING_MULTIPROCESSORS
from pallas_kernels.numerics import is_invariant
from pallas_kernels.paged_attention.pages import itemsize_of
from pallas_kernels.paged_attention.plan import AttentionPlan

EVERYTHING = 1 << 30
"""More tokens than any context has."""


@dataclass(frozen=True)
class Blocks:
    """Sizes into which the attention kernel is cut.

    Attributes:
        tile: queries (row, head of a group) of a thread block, a power of two of at least 16.
        keys: keys of a loop step, a power of two of at least 16.
        warps, stages: Triton's warps of a thread block, and steps of the loop whose loads overlap.
        split_keys: least keys of a unit, where a tile has more of them.
        max_splits: most units over the keys of a tile.
        programs: thread blocks per KV head; each walks over several units. 0 starts one per unit.
    """

    tile: int
    keys: int
    warps: int
    stages: int
    split_keys: int
    max_splits: int
    programs: int


def power_of_two(n: int) -> int:
    """Returns the smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


DECODING_TOKENS = 256
"""Steps of up to this many tokens mostly decode."""


def tuned_key(page_dtype: str, head_dim: int, tokens: int) -> str:
    """Returns the name of a case in a file of measured block sizes."""
    return f"{page_dtype}-{head_dim}-{'decode' if tokens <= DECODING_TOKENS else 'prefill'}"


def choose_blocks(
    plan: AttentionPlan, device_kind: str, page_dtype: str, max_splits: int | None = None, **sizes: int
) -> Blocks:
    """Returns the sizes measured on this kind of device (see `pallas_kernels.tuned`), else those of the heuristic for `sizes`.

    `max_splits` is kept as given. Where rows must have the same bits in any company, the sizes follow from the model alone.
    """
    if is_invariant():
        return invariant(sizes["head_dim"], sizes["item_bytes"])
    blocks = heuristic(plan, page_bytes=itemsize_of(page_dtype), **sizes)
    key = tuned_key(page_dtype, sizes["head_dim"], plan.write_slot.shape[0])
    measured = tuned.block_sizes(device_kind, "paged_attention").get(key, {})
    measured = {name: value for name, value in measured.items() if name != "max_splits"}
    if "tile" in measured:  # an item may have fewer queries than that
        measured["tile"] = min(measured["tile"], max(16, power_of_two(plan.q_block * sizes["group"])))
    return replace(blocks, **measured, max_splits=max_splits or blocks.max_splits)


def invariant(head_dim: int, item_bytes: int) -> Blocks:
    """Returns blocks in which a row's keys are added up in the same order by every step: no runs of keys are split, and tiles
    are as large for a token alone as for a prompt, since a tile's shape decides how its rows are added up."""
    exact, wide = item_bytes == 4, head_dim > 128
    return Blocks(
        tile=16 if exact else 64,
        keys=32 if exact or wide else 64,
        warps=8 if exact or wide else 4,
        stages=2 if exact or wide else 3,
        split_keys=EVERYTHING,
        max_splits=1,
        programs=0,
    )


def heuristic(
    plan: AttentionPlan,
    *,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    page_size: int,
    item_bytes: int,
    page_bytes: int,
) -> Blocks:
    """Returns blocks for a program's static sizes, with bytes of a number in the dots (4 means float32) and in the pages.

    A tile of 64 rows is the smallest that Hopper's wgmma multiplies; two thread blocks of that size on a multiprocessor beat
    one of twice the size. Heads of 256 would spill with 4 warps. With up to 256 tokens, a step mostly decodes: it wants many
    loads in flight, and units of a few hundred keys so that a few sequences fill the chip. There, 8-bit pages are bound by their
    conversion, for which small tiles do best (docs/performance.md, "On an H100").
    """
    tokens, table = plan.write_slot.shape[0], plan.block_tables.shape[1]
    wide, small = head_dim > 128, tokens <= DECODING_TOKENS
    converted = small and not wide and page_bytes == 1 and item_bytes == 2
    most = 16 if item_bytes == 4 or converted else 64
    split_keys = max(256, page_size)
    max_splits = min(power_of_two(-(-128 // num_kv_heads)), 64, -(-table * page_size // split_keys))
    return Blocks(
        tile=min(most, max(16, power_of_two(plan.q_block * group))),
        keys=32 if item_bytes == 4 or (wide and small) else 64,
        warps=8 if item_bytes == 4 or wide else 2 if converted else 4,
        stages=2 if wide or item_bytes == 4 else 3,
        split_keys=split_keys,
        max_splits=max_splits,
        programs=-(-STREAMING_MULTIPROCESSORS * 4 // num_kv_heads) if small else 0,
    )
