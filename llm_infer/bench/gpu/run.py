"""Runs everything on a GPU machine in one command: checks every GPU kernel, measures kernels, step and engine, writes JSON and
Markdown.

Each section runs in a process of its own, since a kernel that fails can take the process with it, and writes what it found
at once, so a machine that goes away loses only the section it was in. With `small` sizes everything also runs on a CPU, with
interpreted kernels: that shows that the script works, but its times mean nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

from llm_infer.bench.gpu.section import Section, Setting

SECTIONS = {
    "correctness": ("checks", "correctness"),
    "machine": ("kernels", "machine"),
    "tokens": ("tokens", "tokens"),
    "bits": ("bits", "bits"),
    "attention": ("kernels", "attention"),
    "draws": ("draws", "draws"),
    "engine": ("engine", "throughput"),
    "invariant": ("engine", "invariant"),
    "experts": ("engine", "experts"),
    "profile": ("profile", "profile"),
    "products": ("products", "products"),
    "peers": ("peers", "attention"),
    "blocks": ("kernels", "block_sizes"),
}
"""Name → module and function, the most wanted first. The process that starts the others imports none of them, nor JAX."""


def section(name: str) -> Section:
    """Returns a section by its name."""
    module, function = SECTIONS[name]
    return getattr(importlib.import_module(f"llm_infer.bench.gpu.{module}"), function)


def run(out: str, *, minutes: float, small: bool, only: str) -> int:
    """Runs the sections and writes `gpu.json` and `gpu.md` into the folder `out` after each row.

    Returns:
        0, or 1 where a check failed or a section raised an error (which the report has).
    """
    wanted = [name for name in only.split(",") if name] or list(SECTIONS)
    if unknown := set(wanted) - set(SECTIONS):
        raise SystemExit(f"--only: no section {', '.join(sorted(unknown))}, choose from {', '.join(SECTIONS)}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").unlink(missing_ok=True)  # the report of an earlier run
    deadline = time.monotonic() + 60 * minutes
    for name in wanted:
        if deadline <= time.monotonic():
            _write(folder, name, small, error=f"left out: {minutes} minutes had passed")
            continue
        if small:  # nothing that fails there takes the process with it
            run_section(folder, name, deadline, small)
            continue
        command = [sys.executable, "-m", "llm_infer.bench.gpu.run", str(folder), name, str(deadline), str(int(small))]
        status = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}).returncode
        if status == NO_GPU:
            raise SystemExit("there is no GPU here: use --small to try the script with interpreted kernels")
        if status:
            _write(folder, name, small, error=f"the process ended with {status}")
    report = json.loads((folder / "gpu.json").read_text())
    failed = any(row.get("ok") is False for rows in report["sections"].values() for row in rows)
    return int(failed or bool(report["errors"]))


NO_GPU = 3


def run_section(folder: Path, name: str, deadline: float, small: bool) -> int:
    """Runs one section in this process; returns the process's exit status."""
    import jax

    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu and not small:
        return NO_GPU
    setting = Setting(small, interpret=not on_gpu, deadline=deadline)
    started, rows, error = time.monotonic(), [], None
    try:
        for row in section(name)(setting):
            rows.append(row)
            print(f"{name}: {row}", flush=True)
            _write(folder, name, small, rows)
    except Exception:
        error = traceback.format_exc()
        print(error, flush=True)
    _write(folder, name, small, rows, error, time.monotonic() - started, versions())
    return 0


def _write(
    folder: Path,
    name: str,
    small: bool,
    rows: list[dict[str, Any]] | None = None,
    error: str | None = None,
    seconds: float | None = None,
    versions: dict[str, str] | None = None,
) -> None:
    """Puts what a section found into the report, which has the other sections' already."""
    path = folder / "gpu.json"
    empty = {"versions": {}, "small": small, "sections": {}, "errors": {}, "seconds": {}}
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else empty
    if rows is not None:
        report["sections"][name] = rows
        report["errors"].pop(name, None)
    if error is not None:
        report["errors"].setdefault(name, error)
    if seconds is not None:
        report["seconds"][name] = round(seconds, 1)
    report["versions"] |= versions or {}
    path.write_text(json.dumps(report, indent=1) + "\n")
    (folder / "gpu.md").write_text(markdown(report))


def versions() -> dict[str, str]:
    """Returns what was run, where and when."""
    import jax

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


if __name__ == "__main__":
    directory, named, until, tiny = sys.argv[1:]
    sys.exit(run_section(Path(directory), named, float(until), tiny == "1"))
