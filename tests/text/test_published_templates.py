"""Published chat templates give what transformers makes of them, tool calls also where clients send JSON text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from llm_infer.base.errors import RequestError
from llm_infer.text.chat_template import apply_chat_template

# These want arguments as text; transformers fails on objects, or leaves the calls out.
TEXT = ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "meetkai-functionary-medium-v3.2")
GOLDENS: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "goldens" / "templates_transformers.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", GOLDENS["digests"])
def test_renderings(shared_data: Path, name: str) -> None:
    file = shared_data / "templates" / f"{name}.jinja"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    source = file.read_text(encoding="utf-8").replace("strftime_now(", "(")  # as in make_template_goldens.py
    digests = GOLDENS["digests"][name]
    found, expected = {}, {}
    for title, conversation in GOLDENS["conversations"].items():
        try:
            text = apply_chat_template(source, bos_token="<s>", eos_token="</s>", **conversation)
            found[title] = hashlib.sha256(text.encode()).hexdigest()
        except RequestError:
            found[title] = "error"
        expected[title] = digests[title]
        if title.startswith("calls"):
            expected[title] = digests["calls as text, null content" if name in TEXT else title.split(" as text")[0]]
    if name in TEXT:  # transformers has no rendering of longer ones to compare with
        del found["calls, several turns"], expected["calls, several turns"]
    assert found == expected
