"""Static record of the TPU kernels: each is compiled for a chip at production shapes, and its schedule read from the dump.

Run on its own (`python -m llm_infer.bench.compiled.tpu CHIP DIR`), it is the process that compiles: jobs in as lines of JSON,
rows out. Columns: `cycles` estimates the whole call, bundles × trips without waits for memory; `around` are XLA's estimates
for the programs beside the kernel (ours: query and new K/V in the kernel's form; jax's: the separate K/V write). `DMA µs` is
the time that the bytes take at the published bandwidth, `roofline µs` the larger of that and the arithmetic at the published
rate.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_infer.base.errors import UserError
from pallas_kernels import tpu_schedule
from pallas_kernels.paged_attention.cases import PRODUCTION, AttentionCase
from pallas_kernels.targets import TARGETS, Target, environment

MACS_PER_CYCLE = {"v5e": 65536, "v6e": 262144, "v5p": 131072, "tpu7x": 262144}  # bfloat16, per JAX device
# Block sizes that compete: (pages of a decode block, pages of a mixed block, rows of a tile), and jax's (pages, queries).
OURS_DECODE, OURS_PREFILL = ((2, 8, 32), (4, 8, 32), (8, 8, 32)), ((4, 4, 32), (4, 4, 64), (4, 8, 16), (4, 8, 32))
JAXS_DECODE, JAXS_PREFILL = ((4, 1), (8, 1), (16, 1), (8, 4), (16, 8)), ((4, 64), (8, 32), (8, 64), (8, 128), (16, 64))
OUR_Q_BLOCK = 128


def record(target: Target) -> Iterator[dict[str, Any]]:
    """Yields, for each production shape, our best block sizes and jax's, by estimated cycles of the whole call."""
    with tempfile.TemporaryDirectory() as directory:
        variables = environment(target)
        variables["LIBTPU_INIT_ARGS"] += " " + tpu_schedule.dump_arguments(directory)
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, target.name, directory],
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        jobs = [
            {"case": name, "implementation": implementation, "blocks": blocks}
            for name, case in PRODUCTION.items()
            for implementation, candidates in _candidates(case)
            for blocks in candidates
        ]
        out, errors = process.communicate("\n".join(json.dumps(job) for job in jobs))
        if process.returncode != 0:
            raise UserError(f"compiling for {target.name} failed:\n{errors[-2000:]}")
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    for name, case in PRODUCTION.items():
        best: dict[str, dict[str, Any]] = {}
        for row in found:
            if row["case"] == name and "cycles" in row:
                chosen = best.get(row["implementation"])
                if chosen is None or _whole(row) < _whole(chosen):
                    best[row["implementation"]] = row
        for row in best.values():
            yield _finished(row, case, target, best.get("jax"))


def _candidates(case: AttentionCase) -> list[tuple[str, Sequence[tuple[int, ...]]]]:
    decode = case.batch[0][0] == 1
    both = case.sizes.head_dim % 128 == 0 and case.kv_scales is None
    jaxs = (JAXS_DECODE if decode else JAXS_PREFILL) if both else ()
    return [("ours", OURS_DECODE if decode else OURS_PREFILL), ("jax", jaxs)]


def _whole(row: dict[str, Any]) -> int:
    return row["cycles"] + row["around"]


def _finished(row: dict[str, Any], case: AttentionCase, target: Target, jaxs: dict[str, Any] | None) -> dict[str, Any]:
    """Returns a row with what follows from the case and the chip."""
    sizes = case.sizes
    kv_tokens = sum(kv_len for _, kv_len in case.batch)
    per_token = 2 * sizes.num_kv_heads * max(sizes.head_dim, 64) * _page_bytes(case)
    rows = sum(q_len for q_len, _ in case.batch)
    pairs = sum(q_len * kv_len - q_len * (q_len - 1) // 2 for q_len, kv_len in case.batch)
    flops = 4 * pairs * sizes.num_heads * sizes.head_dim
    data = kv_tokens * per_token + rows * (2 * sizes.num_heads * sizes.head_dim * 2 + per_token)
    clock = target.flops / (2 * MACS_PER_CYCLE[target.name])
    dma, compute = data / target.bytes_per_s * 1e6, flops / target.flops * 1e6
    return {
        "case": row["case"],
        "implementation": row["implementation"],
        "blocks": "/".join(map(str, row["blocks"])),
        "cycles": row["cycles"],
        "around": row["around"],
        "of jax's": None if jaxs is None else _whole(row) / _whole(jaxs),
        "spilled %": 100 * row["spilled"] / row["inner"],
        "cycles per KV KB": 1024 * row["cycles"] / (kv_tokens * per_token),
        "DMA cycles per KV KB": 1024 / target.bytes_per_s * clock,
        "µs": _whole(row) / clock * 1e6,
        "DMA µs": dma,
        "roofline µs": max(dma, compute),
        "temporary MB": row["temp"] / 1e6,
    }


def _page_bytes(case: AttentionCase) -> int:
    return 2 if case.sizes.page_dtype == "bfloat16" else 1


def our_trips(case: AttentionCase, blocks: Sequence[int], rows_per_item: int, cores: int) -> tuple[Any, Any]:
    """Returns the trips of our kernel's loops on a core, and (loop path, trips of its inner loops) of the busiest one, for
    `tpu_schedule`."""
    size, (decode_pages, mixed_pages, tile_rows) = case.sizes, blocks
    page = size.page_size
    packing = 4 // _page_bytes(case)
    turns = -(-size.num_kv_heads // max(1, packing // (1 if size.head_dim <= 64 else 2)))
    heads_per_turn = -(-size.num_kv_heads // turns)
    decode = [(kv_len, 1) for q_len, kv_len in case.batch if q_len == 1]
    mixed = [
        (kv_len - q_len + min(first + rows_per_item, q_len), min(rows_per_item, q_len - first))
        for q_len, kv_len in case.batch
        if q_len > 1
        for first in range(0, q_len, rows_per_item)
    ]

    def mean(values: list[float]) -> float:
        return sum(values) / max(1, len(values))

    def items(found: list[tuple[int, int]], pages: int, inner: list[Any], at_end: list[Any]) -> tuple[int, list[Any]]:
        blocks = mean([-(-end // (pages * page)) for end, _ in found])
        old = mean([-(-(end - rows) // page) for end, rows in found])  # pages that hold tokens from before the step
        writes = mean([-(-rows // page) for _, rows in found])
        inside = [(old / max(1.0, blocks), []), *inner]
        return -(-len(found) // cores), [(writes, []), (blocks, inside), *at_end, (writes, [])]

    tiles = mean([-(-rows // tile_rows) for _, rows in mixed])
    tile_loops = [(tiles, []) for _ in range(heads_per_turn)]
    token_words = size.num_kv_heads * (1 if size.head_dim <= 64 else 2) // packing
    fill = 2 * max(decode_pages, mixed_pages) * page * token_words / 512
    one = items(decode, decode_pages, [], [])
    many = items(mixed, mixed_pages, [(turns, tile_loops)], [(size.num_kv_heads, [])])
    padding = -(-(size.tokens - sum(q_len for q_len, _ in case.batch)) // 8)
    trips = [(fill, []), (decode_pages, []), one, (0, []), many, (padding, []), (padding, [])]
    return trips, ((2, 1), one[1][1][1]) if decode else ((4, 1), many[1][1][1])


def jax_trips(case: AttentionCase, blocks: Sequence[int], head_blocks: int) -> Any:
    """Returns the trips of the loops of jax's kernel: grid, sequences of a block of queries, blocks of a sequence's pages."""
    pages, queries = blocks
    size = case.sizes
    grid = head_blocks * -(-size.tokens // queries)
    # A sequence is visited once for each block of queries in which it has rows, over its whole length each time.
    visits, loads, row = 0, 0, 0
    for q_len, kv_len in case.batch:
        seen = (row + q_len - 1) // queries - row // queries + 1
        visits += seen
        loads += seen * -(-kv_len // (pages * size.page_size))
        row += q_len
    return [(grid, [(head_blocks * visits / grid, [(loads / visits, [])])])]


def compile_jobs(target: Target, directory: Path, lines: Sequence[str]) -> None:
    """Compiles what the lines ask for and prints a row for each; a block size that does not fit gives a row with its error."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from pallas_kernels.paged_attention import (
        AttentionPlan,
        PlanShape,
        kv_pool_shape,
        plan_fields,
        tpu,
    )
    from pallas_kernels.paged_attention.options import by_keyword
    from pallas_kernels.paged_attention.tpu_blocks import Blocks
    from pallas_kernels.targets import make_mesh

    mesh = make_mesh(target)
    array, bf16, i32 = jax.ShapeDtypeStruct, jnp.bfloat16, jnp.int32

    def compiled(function: Any, arguments: tuple[Any, ...], donate: int | None) -> Any:
        placed = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), arguments)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            program = jax.jit(function, in_shardings=placed, donate_argnums=() if donate is None else donate)
            return program.lower(*arguments).compile()

    def ours(case: AttentionCase, blocks: Sequence[int]) -> tuple[Any, Any, Any]:
        size = case.sizes
        q_block = min(OUR_Q_BLOCK, size.tokens)
        shape = PlanShape(size.tokens, size.sequences, size.pages_per_seq, q_block)
        plan = AttentionPlan(**{name: array(dims, i32) for name, dims in plan_fields(shape).items()})
        pool = kv_pool_shape(
            "tpu",
            num_layers=2,
            num_pages=1024,
            page_size=size.page_size,
            num_kv_heads=size.num_kv_heads,
            head_dim=size.head_dim,
            dtype=size.page_dtype,
        )
        k_scale, v_scale = case.kv_scales or (None, None)
        q, kv = (array((size.tokens, heads, size.head_dim), bf16) for heads in (size.num_heads, size.num_kv_heads))

        def call(q: Any, k: Any, v: Any, pages: Any, plan: Any) -> Any:
            scale = size.head_dim**-0.5
            options = dict(scale=scale, blocks=Blocks(*blocks), k_scale=k_scale, v_scale=v_scale)
            return by_keyword(tpu.paged_attention)(q, k, v, pages, plan, layer=1, **options)

        program = compiled(call, (q, kv, kv, array(pool, size.page_dtype), plan), 3)
        return program, "paged_attention", our_trips(case, blocks, shape.q_rows, tpu.CORES.get(target.device_kind, 1))

    def jaxs(case: AttentionCase, blocks: Sequence[int]) -> tuple[Any, Any, Any]:
        from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

        size = case.sizes
        sequences = len(case.batch)

        def call(q: Any, k: Any, v: Any, pages: Any, slots: Any, kv_lens: Any, tables: Any, starts: Any) -> Any:
            new = jnp.stack([k, v], axis=2).reshape(k.shape[0], -1, k.shape[2])
            pages = pages.reshape(-1, *pages.shape[2:]).at[slots].set(new).reshape(pages.shape)
            out = ragged_paged_attention(
                q,
                pages,
                kv_lens,
                tables,
                starts,
                jnp.array([sequences], i32),
                sm_scale=size.head_dim**-0.5,
                num_kv_pages_per_block=blocks[0],
                num_queries_per_block=blocks[1],
                vmem_limit_bytes=target.scratch_bytes * 4 // 5,
            )
            return out, pages

        q, kv = (array((size.tokens, heads, size.head_dim), bf16) for heads in (size.num_heads, size.num_kv_heads))
        pool = array((1024, size.page_size, 2 * size.num_kv_heads, size.head_dim), bf16)
        integers = (
            array((size.tokens,), i32),
            array((sequences,), i32),
            array((sequences, size.pages_per_seq), i32),
            array((sequences + 1,), i32),
        )
        program = compiled(call, (q, kv, kv, pool, *integers), 3)
        trips = jax_trips(case, blocks, head_blocks=1)
        return program, "ragged_paged_attention", (trips, ((0, 0, 0), []))

    for line in lines:
        job = json.loads(line)
        case = PRODUCTION[job["case"]]
        for old in directory.iterdir():
            old.unlink()
        try:
            program, name, (trips, (path, inner)) = (ours if job["implementation"] == "ours" else jaxs)(
                case, job["blocks"]
            )
        except Exception as error:  # of any type; mostly too much memory
            print(json.dumps({**job, "error": str(error).splitlines()[0][:200]}), flush=True)
            continue
        loops = tpu_schedule.read(directory, name)
        busiest = loops
        for step in path:
            busiest = busiest.inner[step]
        row = {
            "cycles": round(tpu_schedule.cycles(loops, trips)),
            "around": around(program.as_text()),
            "inner": tpu_schedule.cycles(busiest, inner),
            "spilled": tpu_schedule.spilled(busiest, inner),
            "temp": program.memory_analysis().temp_size_in_bytes,
        }
        print(json.dumps({**job, **row}), flush=True)


def around(text: str) -> int:
    """Returns the sum of XLA's estimated cycles in the entry computation, where the kernel itself counts none."""
    entry = text[text.index("\nENTRY ") :]
    return sum(int(found) for found in re.findall(r'"estimated_cycles":"(\d+)"', entry))


if __name__ == "__main__":
    compile_jobs(TARGETS[sys.argv[1]], Path(sys.argv[2]), sys.stdin.read().splitlines())
