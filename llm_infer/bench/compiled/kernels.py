"""`llm-infer bench kernels --target CHIP`: prints what the compiler for a chip that is not here says about each kernel.

Each platform has a module of its own with `record(target) -> Iterator[Row]`; this one runs it, prints a table and writes JSON.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from llm_infer.base.errors import UserError
from pallas_kernels.targets import TARGETS, Target, why_not

Row = Mapping[str, str | int | float | None]
"""Column → value. Units are in the columns' names; the first columns say what was compiled. Rows may differ in columns."""


Record = Callable[[Target], Iterator[Row]]
"""The type of `record` in `llm_infer.bench.compiled.PLATFORM`: it compiles each kernel and yields its row."""


def run(name: str, json_file: str | None = None) -> None:
    """Prints the static record of a target and, if asked, writes it as JSON with the versions that made it.

    Raises:
        UserError: the target is unknown, or its compiler is not installed.
    """
    if name not in TARGETS:
        raise UserError(f"--target is {name!r}, expected one of {', '.join(TARGETS)}")
    target = TARGETS[name]
    if reason := why_not(target):
        raise UserError(f"--target {name}: {reason}")
    record: Record = importlib.import_module(f"llm_infer.bench.compiled.{target.platform}").record
    rows = []
    for row in record(target):  # this takes minutes: each row is first shown in a line as it comes, then in the table
        rows.append(dict(row))
        print(", ".join(f"{column} {_text(value)}" for column, value in row.items()), flush=True)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(*columns, title=f"{name}: static record, jax {jax.__version__}")
    for row in rows:
        table.add_row(*(_text(row.get(column)) for column in columns))
    Console(width=max(120, 14 * len(columns))).print(table)
    if json_file is not None:
        Path(json_file).write_text(json.dumps({"target": name, "jax": jax.__version__, "rows": rows}, indent=2) + "\n")


def _text(value: str | int | float | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else value
