"""Runs everything on a GPU machine in one command: checks every GPU kernel, measures kernels, step and engine, writes JSON and
Markdown.

Each section writes what it found at once, so a machine that goes away loses only the section it was in. With `small` sizes
everything also runs on a CPU, with interpreted kernels: that shows that the script works, but its times mean nothing.
"""

from __future__ import annotations

import json
import platform
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from llm_infer.bench.gpu import checks, draws, engine, kernels, peers, products, tokens
from llm_infer.bench.gpu.section import Section, Setting


def sections() -> dict[str, Section]:
    """Returns name → section, the most wanted first."""
    return {
        "correctness": checks.correctness,
        "machine": kernels.machine,
        "tokens": tokens.tokens,
        "draws": draws.draws,
        "attention": kernels.attention,
        "engine": engine.throughput,
        "products": products.products,
        "peers": peers.attention,
        "blocks": kernels.block_sizes,
    }


def run(out: str, *, minutes: float, small: bool, only: str) -> int:
    """Runs the sections and writes `gpu.json` and `gpu.md` into the folder `out` after each of them.

    Returns:
        0, or 1 where a check failed or a section raised an error (which the report has).
    """
    chosen = sections()
    wanted = [name for name in only.split(",") if name] or list(chosen)
    if unknown := set(wanted) - set(chosen):
        raise SystemExit(f"--only: no section {', '.join(sorted(unknown))}, choose from {', '.join(chosen)}")
    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu and not small:
        raise SystemExit("there is no GPU here: use --small to try the script with interpreted kernels")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(small, interpret=not on_gpu, deadline=time.monotonic() + 60 * minutes)
    report: dict[str, Any] = {"versions": versions(), "small": small, "sections": {}, "errors": {}, "seconds": {}}
    failed = False
    for name in wanted:
        if setting.seconds_left <= 0:
            report["errors"][name] = f"left out: {minutes} minutes had passed"
            continue
        started, rows = time.monotonic(), report["sections"].setdefault(name, [])
        try:
            for row in chosen[name](setting):
                rows.append(row)
                failed |= row.get("ok") is False
                print(f"{name}: {row}", flush=True)
        except Exception:
            report["errors"][name] = traceback.format_exc()
            print(report["errors"][name], flush=True)
            failed = True
        report["seconds"][name] = round(time.monotonic() - started, 1)
        (folder / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (folder / "gpu.md").write_text(markdown(report))
    return int(failed)


def versions() -> dict[str, str]:
    """Returns what was run, where and when."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "device": jax.devices()[0].device_kind,
        **{package: metadata.version(package) for package in ("jax", "jaxlib", "flax", "numpy")},
        "python": platform.python_version(),
    }


def markdown(report: dict[str, Any]) -> str:
    """Returns the report as tables."""
    lines = ["# GPU run", "", ", ".join(f"{name} {value}" for name, value in report["versions"].items())]
    if report["small"]:
        lines += ["", "Small sizes: times mean nothing."]
    for name, rows in report["sections"].items():
        lines += ["", f"## {name} ({report['seconds'].get(name, '–')} s)", ""]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        if rows:
            lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    for name, text in report["errors"].items():
        lines += ["", f"## {name}: error", "", "```", text.strip(), "```"]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
