"""The page on tool calls has the table of formats."""

from __future__ import annotations

from pathlib import Path

from llm_infer.text.output_parsing.formats import FORMATS
from llm_infer.text.output_parsing.reasoning import REASONING_FORMATS
from tests.text.output_parsing.outputs import OUTPUTS


def table() -> str:
    """The formats as docs/tool_calls.md shows them, each with a call in one line."""
    rows = []
    for each in sorted(FORMATS, key=lambda each: each.name):
        written = OUTPUTS[each.name].written.strip().replace("\n", " ").replace("|", "\\|")
        others = ", ".join(f"`{name}`" for name in each.aliases)
        rows.append(f"| `{each.name}` | {others} | `{written[:100]}{'…' if len(written) > 100 else ''}` |")
    return "\n".join(rows)


def test_the_documented_formats_are_these() -> None:
    text = (Path(__file__).parents[3] / "docs" / "tool_calls.md").read_text(encoding="utf-8")
    assert table() in text, f"docs/tool_calls.md should have this table:\n{table()}"
    for each in REASONING_FORMATS:
        for name in (each.name, *each.aliases):
            assert f"`{name}`" in text, name
