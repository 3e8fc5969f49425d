"""Imports point down only, and heavy libraries stay where they belong (an import table, checked from the syntax tree)."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    p.relative_to(ROOT) for package in ("llm_infer", "pallas_kernels") for p in (ROOT / package).rglob("*.py")
)

# Who may import a library, by prefix of the module's path.
ONLY_IN = {
    "flax": ("llm_infer/models/", "llm_infer/integrations/tunix.py"),
    "orbax": ("llm_infer/weights/orbax", "llm_infer/train/"),
    "optax": ("llm_infer/train/",),
    "numba": ("pallas_kernels/",),
    "llvmlite": ("pallas_kernels/",),
    "tokenizers": ("llm_infer/text/",),
    "jinja2": ("llm_infer/text/",),
    "typer": ("llm_infer/commands/",),
    "llguidance": ("llm_infer/decoding/grammar.py",),
    "tunix": ("llm_infer/integrations/tunix.py",),
    "lm_eval": ("llm_infer/integrations/lm_eval.py",),
    **dict.fromkeys(
        ("starlette", "uvicorn", "uvloop", "pydantic", "prometheus_client", "opentelemetry"), ("llm_infer/server/",)
    ),
}

# These run without JAX: they can be read, tested and reused on their own.
HOST = (
    *("llm_infer/base/", "llm_infer/scheduler/", "llm_infer/kvcache/", "llm_infer/text/", "llm_infer/config.py"),
    *("llm_infer/options.py", "llm_infer/bench/serving/"),
    *(f"llm_infer/decoding/{name}.py" for name in ("sampling_params", "features", "beam", "speculative", "structured")),
    *("llm_infer/decoding/token_rules.py", "llm_infer/planner/cost.py", "pallas_kernels/paged_attention/plan.py"),
)


class LayerOfCode(NamedTuple):
    """Modules of one height, by prefixes of their paths, and what they hold: a row of docs/architecture.md."""

    prefixes: tuple[str, ...]
    holds: str


# Imports point down only: a module may import from its own layer and from those after it.
LAYERS = (
    LayerOfCode(("llm_infer/commands/", "llm_infer/bench/", "llm_infer/__main__.py"), "the command line; benchmarks"),
    LayerOfCode(("llm_infer/train/",), "fine-tuning and reinforcement learning over our models"),
    LayerOfCode(
        ("llm_infer/integrations/",), "adapters for other projects' trainers and harnesses, which nothing imports"
    ),
    LayerOfCode(
        ("llm_infer/llm.py", "llm_infer/functional/"), "`LLM`, the synchronous class; the model as functions of arrays"
    ),
    LayerOfCode(("llm_infer/server/",), "the HTTP server: routes, who may come in, the engine's thread"),
    LayerOfCode(("llm_infer/frontend/",), "text requests over an engine, shared by all fronts"),
    LayerOfCode(("llm_infer/starting.py",), "from options to tokenizer and engine, on one host or several"),
    LayerOfCode(
        ("llm_infer/loading.py", "llm_infer/checkpoints.py"),
        "a model's name to a loaded model; weights from and to other programs",
    ),
    LayerOfCode(("llm_infer/planner/",), "memory in closed form; compiling for chips that are not here"),
    LayerOfCode(("llm_infer/engine/",), "step programs, runner, engine; token ids only"),
    LayerOfCode(("llm_infer/models/", "llm_infer/text/"), "decoder and families; tokenizers and chat templates"),
    LayerOfCode(
        ("llm_infer/weights/", "llm_infer/scheduler/", "llm_infer/decoding/"),
        "files to parameters; which tokens a step computes; how tokens are chosen",
    ),
    LayerOfCode(("llm_infer/kvcache/",), "page allocator, page tables, prefix cache, states"),
    LayerOfCode(("llm_infer/parallel/",), "mesh, what is cut over it, collectives, several hosts"),
    LayerOfCode(("llm_infer/quant/",), "weights in fewer bits as pytrees"),
    LayerOfCode(("llm_infer/options.py",), "every setting of an engine, once: arguments, files and flags"),
    LayerOfCode(("llm_infer/config.py",), "engine configuration, checked when it is made"),
    LayerOfCode(("llm_infer/base/",), "errors, results, progress, the environment"),
    LayerOfCode(("llm_infer/__init__.py",), "public names"),
    LayerOfCode(("pallas_kernels/",), "kernels over plain arrays, chosen by device, dtype and shape"),
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
    for index, (prefixes, _) in enumerate(LAYERS):
        if any(path.startswith(p.removesuffix(".py").removesuffix("/")) for p in prefixes):
            return index
    return len(LAYERS) - 2  # the package itself


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


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Also imports within functions count; those for type checkers alone do not."""
    names = {dotted(path): path for path in MODULES}
    graph = {name: imports(path, everywhere=True) & names.keys() - {name} for name, path in names.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' → '.join(error.args[1])}")


def dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def layer_table() -> str:
    """The layers as docs/architecture.md shows them, highest first."""
    names = [", ".join(f"`{prefix.removeprefix('llm_infer/')}`" for prefix in each.prefixes) for each in LAYERS]
    rows = [f"| {name} | {each.holds} |" for name, each in zip(names, LAYERS, strict=True)]
    return "\n".join(["| layer | holds |", "|---|---|", *rows])


def test_the_documented_layers_are_these() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert layer_table() in text, f"docs/architecture.md should have this table:\n{layer_table()}"


def test_every_module_is_in_one_layer() -> None:
    for path in MODULES:
        homes = [each for each in LAYERS if path.as_posix().startswith(each.prefixes)]
        assert len(homes) == 1, f"{path} is in {len(homes)} layers"
