"""Pages for users name what there is: every parameter, and only files that exist."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from llm_infer.decoding.sampling_params import SamplingParams

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def test_the_table_of_parameters_has_all_of_them_in_order() -> None:
    found = re.findall(r"^\| `(\w+)` \| ", (ROOT / "docs" / "using.md").read_text(), re.MULTILINE)
    names = [field.name for field in fields(SamplingParams)]
    assert sorted(found[: len(names)]) == sorted(names)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"
