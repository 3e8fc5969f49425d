"""Our grammars allow the texts that xgrammar's structural tags allow, and no others; the scanner reads the calls in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_infer.decoding.grammar import GrammarCompiler
from llm_infer.decoding.structured import StructuredOutputsParams
from llm_infer.text.output_parsing.call_grammar import call_grammar
from llm_infer.text.output_parsing.formats import tool_format
from llm_infer.text.output_parsing.functions import functions_of
from tests.text.output_parsing.outputs import scan

GOLDENS: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "goldens" / "tool_calls_xgrammar.json").read_text(encoding="utf-8")
)
FUNCTIONS = functions_of([{"type": "function", "function": tool} for tool in GOLDENS["tools"]])

# Where we follow the models' templates instead: a function without parameters has no empty line, line breaks before calls may
# be missing, and nothing is no call.
OURS = {
    ("qwen_3_coder", "none"): True,
    ("qwen_3_coder", "two"): True,
    ("qwen_3_coder", "three"): True,
    ("deepseek_v3_2", "all, without a beginning"): True,
    ("deepseek_v4", "all, without a beginning"): True,
    ("harmony", "all, nothing"): False,
}
END = 256


@pytest.mark.parametrize("model", sorted(GOLDENS["models"]))
def test_forced_calls_are_those_that_xgrammar_allows(model: str) -> None:
    found = GOLDENS["models"][model]
    vocabulary = [*(bytes([i]) for i in range(256)), b"<eos>"]
    compiler = GrammarCompiler(
        vocabulary, [], [END], lambda text: list(text.encode() if isinstance(text, str) else text)
    )
    text = call_grammar(tool_format(found["format"]), list(FUNCTIONS.values()), choice="required")
    assert text is not None
    grammar = compiler.compile(StructuredOutputsParams(grammar=text))

    def accepts(written: str) -> bool:
        matcher, output, mask = grammar.matcher(), list[int](), np.zeros(9, np.int32)
        for token in [*written.encode(), END]:
            assert matcher.fill(output, mask) is None
            if not mask[token // 32] >> token % 32 & 1:
                return False
            output.append(token)
        return True

    for name, written, accepted, _ in found["cases"]:
        # A token that ends the output is no part of it.
        assert accepts(written.removesuffix("<|call|>")) == OURS.get((model, name), accepted), (name, written)


@pytest.mark.parametrize("model", sorted(GOLDENS["models"]))
def test_calls_that_xgrammar_allows_are_read(model: str) -> None:
    found = GOLDENS["models"][model]
    schemas = {function.name: dict(function.parameters or {}) for function in FUNCTIONS.values()}
    read = 0
    for name, written, accepted, calls in found["cases"]:
        if accepted and calls is not None:
            result = scan(list(written), found["format"], functions=schemas)
            assert (result.values, result.text) == ([tuple(call) for call in calls], ""), name
            read += 1
    assert read >= 4
