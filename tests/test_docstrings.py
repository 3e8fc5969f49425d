"""Docstrings of functions start with a verb ("Returns …"), those of properties with a noun."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FOLDERS = ("pallas_kernels", "llm_infer")

_NOUNS = """
    arguments arrays bits blocks bytes characters definitions devices digits frequencies heads ids items kernels keys kinds
    layers lengths limits lines logits means medians messages metrics milliseconds numbers owners pages parameters
    parts pointers products queries requests results rows samples seconds sequences shapes sizes steps templates texts
    threads times tokens trips values variables vectors weights words
"""
NOUNS = frozenset(_NOUNS.split())
"""Plurals that docstrings are tempted to start with, and that are no verbs there."""


def starts_with_verb(docstring: str) -> bool:
    """Whether the first word is capitalised and looks like a verb in the third person."""
    word = docstring.split()[0].rstrip(",:")
    looks = word[:1].isupper() and word.isalpha() and word.endswith("s") and not word.endswith("ss")
    return looks and word not in ("As", "Its", "This", "Always") and word.lower() not in NOUNS


def docstrings(path: Path) -> Iterator[tuple[str, str, bool]]:
    """Place and docstring of each function that has one, and whether it is a property."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
            is_property = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", text, is_property


def test_functions_docstrings_start_with_verbs_and_properties_with_nouns() -> None:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 200
    wrong = [
        f"{place}: {text.splitlines()[0]}"
        for path in files
        for place, text, is_property in docstrings(path)
        if (text.startswith(("Returns", "Checks", "Gets", "Gives")) if is_property else not starts_with_verb(text))
    ]
    assert not wrong, "functions' docstrings start with a verb, properties' with a noun:\n" + "\n".join(wrong)


@pytest.mark.parametrize("text", ["Returns the ids.", "Checks whether …", "Multiplies x with …", "Does: nothing."])
def test_verbs_in_the_third_person_pass(text: str) -> None:
    assert starts_with_verb(text)


@pytest.mark.parametrize(
    "text", ["The ids.", "Read the ids.", "Ids of a text.", "See `encode`.", "[T, D] as is.", "As `f`."]
)
def test_other_beginnings_do_not(text: str) -> None:
    assert not starts_with_verb(text)
