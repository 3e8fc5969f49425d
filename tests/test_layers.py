"""Imports point down only, and heavy libraries stay where they belong (an import table, checked from the syntax tree)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    p.relative_to(ROOT) for package in ("llm_infer", "pallas_kernels") for p in (ROOT / package).rglob("*.py")
)

# Who may import a library, by prefix of the module's path.
ONLY_IN = {
    "flax": ("llm_infer/models/", "llm_infer/engine/steps.py", "llm_infer/engine/multi_step.py"),
    "orbax": ("llm_infer/weights/orbax",),
    "numba": ("pallas_kernels/",),
    "llvmlite": ("pallas_kernels/",),
    "tokenizers": ("llm_infer/text/",),
    "jinja2": ("llm_infer/text/",),
    "typer": ("llm_infer/cli",),
    "llguidance": ("llm_infer/decoding/grammar.py",),
}

# These run without JAX: they can be read, tested and reused on their own.
HOST = (
    *("llm_infer/scheduler/", "llm_infer/kvcache/page_", "llm_infer/kvcache/prefix_", "llm_infer/kvcache/simulate"),
    *(
        "llm_infer/text/",
        "llm_infer/errors.py",
        "llm_infer/config.py",
        "llm_infer/outputs.py",
        "llm_infer/accelerators.py",
        "llm_infer/plain_values.py",
    ),
    *(
        "llm_infer/decoding/sampling_params.py",
        "llm_infer/decoding/beam.py",
        "llm_infer/decoding/speculative.py",
        "llm_infer/decoding/structured.py",
        "llm_infer/decoding/token_rules.py",
        "llm_infer/planner/cost.py",
        "pallas_kernels/paged_attention/plan.py",
    ),
)

# Lower layers may not import higher ones; a module may import from its own layer and from those after it.
ORDER = (
    ("llm_infer/cli.py", "llm_infer/bench/", "llm_infer/doctor.py", "llm_infer/kernel_report.py"),
    ("llm_infer/engine_arguments.py",),
    ("llm_infer/llm.py", "llm_infer/session.py", "llm_infer/tracking.py"),
    ("llm_infer/loading.py",),
    ("llm_infer/planner/",),
    ("llm_infer/engine/",),
    ("llm_infer/models/", "llm_infer/text/"),
    ("llm_infer/weights/", "llm_infer/scheduler/", "llm_infer/decoding/"),
    ("llm_infer/kvcache/",),
    ("llm_infer/parallel/",),
    ("llm_infer/quant/",),
    (
        *("llm_infer/config.py", "llm_infer/errors.py", "llm_infer/outputs.py", "llm_infer/interrupts.py"),
        *("llm_infer/accelerators.py", "llm_infer/plain_values.py", "llm_infer/forks.py"),
    ),
    ("llm_infer/__init__.py",),
    ("pallas_kernels/",),
)


def imports(path: Path, *, everywhere: bool) -> set[str]:
    """Dotted names that a module imports; at module level only, unless `everywhere`. Type-checking blocks are left out."""
    tree = ast.parse((ROOT / path).read_text())
    found: set[str] = set()

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import) and (top or everywhere):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and (top or everywhere):
                found.add(child.module or "")
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child, top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(tree, True)
    return found


def layer(module: str) -> int:
    path = module.replace(".", "/")
    for index, prefixes in enumerate(ORDER):
        if any(path.startswith(p.removesuffix(".py").removesuffix("/")) for p in prefixes):
            return index
    return len(ORDER) - 2  # the package itself


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports(path: Path) -> None:
    name = path.as_posix()
    all_imports = imports(path, everywhere=True)
    for library, homes in ONLY_IN.items():
        if not name.startswith(homes):
            assert not any(i.split(".")[0] == library for i in all_imports), f"{name} imports {library}"
    if name.startswith(HOST):
        assert not any(i.split(".")[0] in ("jax", "jaxlib") for i in imports(path, everywhere=False)), name
    if name.startswith("pallas_kernels/"):
        assert not any(i.split(".")[0] == "llm_infer" for i in all_imports), f"{name} imports llm_infer"
    if name.startswith("llm_infer/engine/"):
        assert not any(i.startswith("llm_infer.text") for i in all_imports), f"{name}: the engine knows token ids only"
    own = layer(name.removesuffix(".py"))
    for imported in all_imports:
        if imported.startswith(("llm_infer.", "pallas_kernels.")):
            assert layer(imported) >= own, f"{name} imports {imported}, which lies above it"
