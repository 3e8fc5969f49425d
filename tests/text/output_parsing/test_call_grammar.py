"""Whatever a grammar forces is read as calls whose arguments their schemas allow."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest

from llm_infer.base.errors import RequestError
from llm_infer.decoding.grammar import CompiledGrammar, GrammarCompiler
from llm_infer.decoding.structured import StructuredOutputsParams
from llm_infer.text.output_parsing.call_grammar import call_grammar
from llm_infer.text.output_parsing.formats import FORMATS, tool_format
from llm_infer.text.output_parsing.functions import Function, functions_of
from llm_infer.text.output_parsing.reasoning import REASONING_FORMATS, reasoning_format
from tests.text.output_parsing.outputs import OUTPUTS, Read, scan

SCHEMAS: dict[str, dict[str, Any] | None] = {
    "now": None,
    "get_weather": {
        "type": "object",
        "title": "Weather",
        "properties": {
            "city": {"type": "string", "description": "where"},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "units": {"enum": ["C", "F"]},
            "where": {"$ref": "#/$defs/place"},
            "note": {"type": ["string", "null"]},
        },
        "required": ["city", "units"],
        "$defs": {
            "place": {
                "type": "object",
                "properties": {"lat": {"type": "number"}},
                "required": ["lat"],
                "additionalProperties": False,
            }
        },
    },
    "find": {
        "type": "object",
        "properties": {
            "code": {"type": "string", "pattern": "^[A-Z]{2}/[0-9]+$"},
            "day": {"type": "string", "format": "date"},
            "name": {"type": "string", "minLength": 2, "maxLength": 4},
            "all": {"type": "boolean"},
        },
        "required": ["all"],
    },
}
FOUND = [Function(name, schema, True) for name, schema in SCHEMAS.items()]

MARKERS = sorted(
    {marker for each in (*FORMATS, *REASONING_FORMATS) for marker in each.markers} | {"<|start|>", "<|python_start|>"}
)
SPECIAL = {text: 257 + index for index, text in enumerate(MARKERS)}
TOKENS = [*(bytes([i]) for i in range(256)), b"<eos>", *(text.encode() for text in MARKERS)]
END = 256
ENDS = [
    "\n",
    "</parameter>",
    "</｜DSML｜parameter>",
    "\n</parameter>\n",
    "</think>",
    "</seed:think>",
    "[/THINK]",
    "</arg_value>",
    '"',
    "<|end|>",
]
FORMAT_NAMES = [each.name for each in FORMATS]


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    """One whose tokens are bytes and, as special tokens, all markers."""
    return GrammarCompiler(
        TOKENS, list(SPECIAL.values()), [END], lambda text: list(text.encode() if isinstance(text, str) else text)
    )


class Walk:
    """A walk through a grammar, token by token."""

    def __init__(self, grammar: CompiledGrammar) -> None:
        self.matcher, self.output = grammar.matcher(), list[int]()

    def allowed(self) -> list[int]:
        mask = np.zeros(-(-len(TOKENS) // 32), np.uint32)
        why = self.matcher.fill(self.output, mask.view(np.int32))
        assert why is None, (why, self.text)
        return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()

    @property
    def text(self) -> str:
        return b"".join(TOKENS[i] for i in self.output).decode(errors="replace")


def draw(grammar: CompiledGrammar, rng: random.Random) -> str:
    """An output of the grammar, which leaves free text soon."""
    walk, planned = Walk(grammar), list[int]()
    for _ in range(3000):
        tokens = walk.allowed()
        if END in tokens and (len(tokens) == 1 or rng.random() < 0.3):
            return walk.text
        if planned and planned[0] in tokens:
            walk.output.append(planned.pop(0))
            continue
        plain = [i for i in tokens if i != END and not 128 <= i < 256 and (i >= 32 or i == 10)]
        tokens = plain or [i for i in tokens if i != END]
        planned = []
        markers = [i for i in tokens if i > END]
        if markers and rng.random() < 0.5:
            walk.output.append(rng.choice(markers))
        elif len(tokens) > 60 and rng.random() < 0.4:
            planned = list(rng.choice(ENDS).encode())
            walk.output.append(planned.pop(0) if planned[0] in tokens else rng.choice(tokens))
        elif len(tokens) < 20 and ord('"') in tokens and rng.random() < 0.3:
            walk.output.append(ord('"'))
        else:
            walk.output.append(rng.choice(tokens))
    raise AssertionError(f"no end: {walk.text[:500]}")


def accepts(grammar: CompiledGrammar, text: str, special: Mapping[str, int]) -> bool:
    walk, rest = Walk(grammar), text
    while rest:
        marker = next((each for each in special if rest.startswith(each)), None)
        for token in [special[marker]] if marker else rest[0].encode():
            if token not in walk.allowed():
                return False
            walk.output.append(token)
        rest = rest[len(marker or rest[0]) :]
    return END in walk.allowed()


def check_calls(found: Read) -> None:
    for _, name, arguments, complete in found.calls:
        assert complete, found
        schema = SCHEMAS[name] or {"type": "object", "maxProperties": 0}
        jsonschema.validate(json.loads(arguments), {**schema, "additionalProperties": False})


def compiled(compiler: GrammarCompiler, grammar: str | None) -> CompiledGrammar:
    assert grammar is not None
    return compiler.compile(StructuredOutputsParams(grammar=grammar))


def walks(count: int, *parts: object) -> list[random.Random]:
    return [random.Random(f"{parts} {i}") for i in range(count)]


def special_of(name: str, special: bool) -> dict[str, int]:
    """Markers as special tokens, or none of them, as tokenizers differ."""
    return {text: SPECIAL[text] for text in tool_format(name).markers} if special else {}


def check_required(compiler: GrammarCompiler, name: str, special: bool, count: int) -> None:
    tokens = special_of(name, special)
    several = compiled(compiler, call_grammar(tool_format(name), FOUND, choice="required", special_tokens=tokens))
    one = compiled(
        compiler,
        call_grammar(tool_format(name), FOUND, choice="required", parallel=False, special_tokens=tokens),
    )
    for rng in walks(count, name, special):
        for grammar, most in ((several, 100), (one, 1)):
            written = draw(grammar, rng)
            found = scan(written, name, functions=SCHEMAS)
            assert 1 <= len(found.calls) <= most, written
            assert not found.text, written
            check_calls(found)


@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_required_calls_are_read_and_valid(compiler: GrammarCompiler, name: str, special: bool) -> None:
    check_required(compiler, name, special, 2)


@pytest.mark.sweep
@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_many_required_calls_are_read_and_valid(compiler: GrammarCompiler, name: str, special: bool) -> None:
    check_required(compiler, name, special, 60)


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_a_named_function_is_called_once(compiler: GrammarCompiler, name: str) -> None:
    grammar = compiled(compiler, call_grammar(tool_format(name), FOUND, choice="auto", name="find"))
    for rng in walks(2, name):
        found = scan(draw(grammar, rng), name, functions=SCHEMAS)
        assert [call[1] for call in found.calls] == ["find"] and not found.text
        check_calls(found)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_strict_calls_within_an_answer_are_valid(compiler: GrammarCompiler, name: str, parallel: bool) -> None:
    tokens = special_of(name, True)
    grammar = compiled(
        compiler, call_grammar(tool_format(name), FOUND, choice="auto", parallel=parallel, special_tokens=tokens)
    )
    assert name == "openai" or accepts(grammar, "Just text.", {})
    counts = []
    for rng in walks(4, name, parallel):
        found = scan(draw(grammar, rng), name, functions=SCHEMAS)
        counts.append(len(found.calls))
        check_calls(found)
    assert parallel or max(counts) <= 1


@pytest.mark.parametrize("in_reasoning", [True, False])
@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
@pytest.mark.parametrize("thinks", ["qwen3", "seed_oss", "mistral"])
def test_calls_are_forced_after_the_reasoning(
    compiler: GrammarCompiler, thinks: str, special: bool, in_reasoning: bool
) -> None:
    reasoning = reasoning_format(thinks)
    tokens = {text: SPECIAL[text] for text in reasoning.markers} if special else {}
    grammar = compiled(
        compiler,
        call_grammar(
            tool_format("hermes"),
            FOUND,
            choice="required",
            special_tokens=tokens,
            reasoning=reasoning,
            in_reasoning=in_reasoning,
        ),
    )
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert accepts(grammar, call, tokens) != in_reasoning
    thoughts = f"{'' if in_reasoning else reasoning.start}I think of <tool_call>.\n{reasoning.end}\n\n"
    assert accepts(grammar, thoughts + call, tokens)
    assert not accepts(grammar, thoughts + "No.", tokens)
    for rng in walks(2, thinks, special, in_reasoning):
        found = scan(draw(grammar, rng), "hermes", thinks, in_reasoning=in_reasoning, functions=SCHEMAS)
        assert found.calls and not found.text
        check_calls(found)


@pytest.mark.parametrize("in_reasoning", [True, False])
def test_a_model_may_think_and_answer_where_calls_are_strict(compiler: GrammarCompiler, in_reasoning: bool) -> None:
    grammar = compiled(
        compiler,
        call_grammar(
            tool_format("hermes"),
            FOUND,
            choice="auto",
            reasoning=reasoning_format("qwen3"),
            in_reasoning=in_reasoning,
        ),
    )
    thoughts = f"{'' if in_reasoning else '<think>'}Hm.\n</think>\n\n"
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for right in ("Hello.", call, f"I look.\n{call}\n{call}", f"{call}\nDone."):
        assert accepts(grammar, thoughts + right, {}), right
    for wrong in ("<tool_call>", call.replace("now", "rm"), f"Hello.\n{call[:-1]}", call.replace("{}", '{"a": 1}')):
        assert not accepts(grammar, thoughts + wrong, {}), wrong


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_the_form_that_models_were_trained_on_is_allowed(compiler: GrammarCompiler, name: str) -> None:
    functions = [Function("get_weather", SCHEMAS["get_weather"]), Function("now", {"type": "object"})]
    functions[0] = Function("get_weather", {**(SCHEMAS["get_weather"] or {}), "required": []})
    grammar = compiled(compiler, call_grammar(tool_format(name), functions, choice="required"))
    assert accepts(grammar, FORCED.get(name, OUTPUTS[name].written.removeprefix("So.\n")), {})


_ARGS = '{"city": "Paris", "days": 2}'
FORCED = {
    "openai": f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{_ARGS}",
    "deepseek_v31": OUTPUTS["deepseek_v31"].written.removeprefix("I see."),
    "seed_oss": OUTPUTS["seed_oss"].written.removeprefix("<seed:think>hm</seed:think>"),
    "glm45": OUTPUTS["glm45"].written.removeprefix("So.\n"),
    "lfm2": '<|tool_call_start|>[get_weather(city="Paris", days=2)]<|tool_call_end|>',
    "olmo3": '<function_calls>\nget_weather(city="Paris", days=2)\nnow()\n</function_calls>',
    "pythonic": '[get_weather(city="Paris", days=2), now()]',
    "llama4_pythonic": '[get_weather(city="Paris", days=2)]',
    "mistral_old": OUTPUTS["mistral_old"].written.replace("] [", "][", 1),
}


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        ("^a/b$", ["a/b"], ["a/", "xa/b"]),
        (r"^a\/b$", ["a/b"], [r"a\/b"]),
        ("b", ["abc", "b"], ["a"]),
        ("^a", ["ab"], ["ba"]),
        ("a|b", ["xa", "bx"], ["x"]),
        ("^\n$", ["\n"], ["n"]),
        (r"^\\/$", [r"\/"], ["/"]),
        ("^$", [""], ["a"]),
        ("^", ["", "a"], ["</arg_value>"]),
        (r"a\$", ["a$", "xa$y"], ["a"]),
        (r"a\\$", ["xa\\"], ["a", "a\\b"]),
        ("^a/\nx: /b$", ["a/\nx: /b"], ["a", "b", "a/"]),
        ('^" | "x$', ['" ', ' "x'], ["x", "</arg_value>", ""]),
    ],
)
def test_patterns_are_followed_by_bare_text(
    compiler: GrammarCompiler, pattern: str, right: list[str], wrong: list[str]
) -> None:
    schema = {"properties": {"a": {"type": "string", "pattern": pattern}}, "required": ["a"]}
    grammar = compiled(compiler, call_grammar(tool_format("glm47"), [Function("f", schema)], choice="required"))
    for texts, allowed in ((right, True), (wrong, False)):
        for text in texts:
            written = f"<tool_call>f<arg_key>a</arg_key><arg_value>{text}</arg_value></tool_call>"
            assert accepts(grammar, written, {}) == allowed, text


@pytest.mark.parametrize("pattern", ["\\", "(", "(?=a)", "[", "a)|(b"])
def test_patterns_that_are_none_are_refused(compiler: GrammarCompiler, pattern: str) -> None:
    schema = {"properties": {"a": {"type": "string", "pattern": pattern}}, "required": ["a"]}
    text = call_grammar(tool_format("glm47"), [Function("f", schema)], choice="required")
    with pytest.raises(RequestError):
        compiled(compiler, text)


def test_nothing_is_forced_where_the_model_may_answer_and_no_function_is_strict() -> None:
    assert call_grammar(tool_format("hermes"), [Function("now")], choice="auto") is None
    assert call_grammar(tool_format("hermes"), [], choice="required") is None


@pytest.mark.parametrize(
    ("format", "schema", "message"),
    [
        ("hermes", {"type": "array"}, r"tools\[0\].function.parameters.type='array': expected 'object'"),
        (
            "hermes",
            {"properties": {"a": {"const": 2**53 + 1}}},
            r"^tools\[0\].function.parameters: #/properties/a/const = 9007199254740993",
        ),
        ("qwen3_coder", {"properties": {}, "anyOf": []}, r"parameters.anyOf: this model's form"),
        ("qwen3_coder", {"properties": {"a>": {}}}, r"parameters.properties.a>: this model's form .* the name 'a>'"),
        ("qwen3_coder", {"properties": {"a": {"type": "string", "not": {}}}}, r"properties.a.not: this model's form"),
        (
            "qwen3_coder",
            {"properties": {"a": {"type": "string", "format": "x"}}},
            r"a.format='x': expected one of date",
        ),
        ("qwen3_coder", {"properties": {"a": {"type": "string", "pattern": 5}}}, r"a.pattern=5: expected a text"),
        ("qwen3_coder", {"properties": {"a": {"type": "string", "enum": 5}}}, r"a.enum=5: expected a list"),
        ("qwen3_coder", {"properties": {"a": {"type": "string", "enum": []}}}, r"a.enum=\[\]: expected at least one"),
        (
            "qwen3_coder",
            {"properties": {"a": {"type": "string", "minLength": "1"}}},
            r"a.minLength='1': expected a whole",
        ),
        (
            "qwen3_coder",
            {"properties": {"a": {"type": "string", "format": ["date"]}}},
            r"format=\['date'\]: expected a text",
        ),
        ("qwen3_coder", {"properties": {"a": False}}, r"properties.a=False: expected a JSON schema"),
        ("qwen3_coder", {"properties": []}, r"function.parameters: expected properties as an object"),
        ("pythonic", {"properties": {}, "required": [[]]}, r"required names \[\], which properties"),
        ("glm45", {"properties": {}, "required": ["b"]}, r"parameters.required names 'b', which properties"),
        ("pythonic", {"properties": {"a-b": {}}}, r"parameters.properties.a-b: this model's form"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_its_place(format: str, schema: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        call_grammar(tool_format(format), [Function("f", schema)], choice="required")


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([{}], r"tools\[0\]: expected"),
        ([{"type": "custom", "function": {"name": "a"}}], r"tools\[0\]: expected"),
        ([{"function": {}}], r"tools\[0\].function.name=None: expected"),
        ([{"function": {"name": "a b"}}], r"name='a b': expected"),
        ([{"function": {"name": "a"}}, {"function": {"name": "a"}}], r"tools\[1\].function.name='a' is there twice"),
        ([{"function": {"name": "a", "parameters": []}}], r"parameters=\[\]: expected a JSON schema"),
        ([{"function": {"name": "a", "strict": "yes"}}], r"strict='yes': expected true or false"),
        ([{"function": {"name": f"a{i}"}} for i in range(129)], r"tools has 129 entries, the limit is 128"),
    ],
)
def test_malformed_tools_are_refused(tools: Sequence[dict[str, Any]], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        functions_of(tools)


def test_functions_are_found_by_name() -> None:
    given = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}
    assert functions_of([given]) == {"f": Function("f", {"type": "object"}, True, "tools[0].function")}
    with pytest.raises(RequestError, match="tool_choice names the function 'g', which tools does not have"):
        call_grammar(tool_format("hermes"), [Function("f")], choice="auto", name="g")
