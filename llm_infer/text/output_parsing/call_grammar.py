"""Makes the grammar that has a model write tool calls: what it forces is what the scanner reads, as both follow one table."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from llm_infer.base.errors import RequestError
from llm_infer.text.output_parsing.casting import is_bare
from llm_infer.text.output_parsing.functions import Function
from llm_infer.text.output_parsing.lark import Lark, string_bodies
from llm_infer.text.output_parsing.literals import json_text
from llm_infer.text.output_parsing.reasoning import ReasoningFormat
from llm_infer.text.output_parsing.rules import Harmony, JsonCalls, NamedJson, Pythonic, Tagged, ToolFormat

_COMPOSED = ("allOf", "anyOf", "oneOf", "$ref", "if", "patternProperties")
_PLAIN = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "title", "description"}
_PLAIN |= {"$schema", "$id", "$comment", "default", "examples", "strict"}


def call_grammar(
    format: ToolFormat,
    functions: Sequence[Function],
    *,
    choice: Literal["auto", "required"],
    name: str | None = None,
    parallel: bool = True,
    special_tokens: Mapping[str, int] | None = None,
    reasoning: ReasoningFormat | None = None,
    in_reasoning: bool = False,
) -> str | None:
    """Returns a grammar for `StructuredOutputsParams.grammar`; None if nothing is to be forced.

    Args:
        format: how the model writes calls.
        functions: what it may call. Calls obey the schemas of their parameters.
        choice: "required" forces one call or more; "auto" lets the model answer, and forces the form of its calls if one of the
            functions is strict.
        name: forces exactly one call, of this function.
        parallel: whether there may be several calls.
        special_tokens: text → id of the model's special tokens.
        reasoning: lets the model write its reasoning first.
        in_reasoning: whether the output begins within the reasoning.

    Raises:
        RequestError: a schema asks for something that cannot be followed, or no function has that name.
    """
    if name is not None:
        functions = [each for each in functions if each.name == name]
        if not functions:
            raise RequestError(f"tool_choice names the function {name!r:.60}, which tools does not have")
        choice, parallel = "required", False
    if not functions or (choice == "auto" and not any(each.strict for each in functions)):
        return None
    return _Builder(format, functions, parallel, special_tokens or {}).grammar(choice, reasoning, in_reasoning)


class _Builder:
    """Writes the grammar of one request."""

    def __init__(
        self, format: ToolFormat, functions: Sequence[Function], parallel: bool, special_tokens: Mapping[str, int]
    ) -> None:
        self._format, self._functions, self._parallel = format, functions, parallel
        self._lark = Lark(special_tokens)

    def grammar(self, choice: str, reasoning: ReasoningFormat | None, in_reasoning: bool) -> str:
        """Returns the whole grammar."""
        rule, required = self._format.rule, choice == "required"
        if isinstance(rule, Harmony):
            return self._lark.finish(self._harmony(required))
        thoughts = self._thoughts(reasoning, in_reasoning)
        return self._lark.finish(f"{thoughts} {self._calls() if required else self._answer()}")

    def _thoughts(self, reasoning: ReasoningFormat | None, in_reasoning: bool) -> str:
        if reasoning is None or not reasoning.start:
            return ""
        thoughts = rf"{self._lark.until(reasoning.end)} /\n{{0,2}}/"
        return thoughts if in_reasoning else f"({self._lark.literal(reasoning.start)} {thoughts})?"

    def _answer(self) -> str:
        """Returns an expression for text with calls wherever the marker for them stands."""
        format, lark = self._format, self._lark
        if format.bare:
            opening = r"\{\[" if isinstance(format.rule, JsonCalls) else r"\["
            text = lark.text(format.start, rf"(?s:\s*[^\s{opening}].*)?|\s*")
            return f"({self._calls()} | {text})"
        trigger = lark.until(format.start)
        call = f"{trigger} {self._section(started=True)}"
        tail = lark.text(format.start)
        return f"({call})* {tail}" if self._parallel else f"({call} | {tail})"

    def _calls(self) -> str:
        """Returns an expression for one call or more, and nothing else."""
        section = self._lark.rule(self._section())
        if self._format.each is None or not self._parallel:
            return rf"/\n{{0,2}}/ {section}"
        return rf"/\n{{0,2}}/ {section} ({self._lark.literal(self._format.each)} {section})*"

    def _section(self, started: bool = False) -> str:
        format, lark, rule = self._format, self._lark, self._format.rule
        call = lark.rule(" | ".join(self._call(each) for each in self._functions))
        several = self._parallel and format.each is None
        if isinstance(rule, JsonCalls | Pythonic) and rule.listed:
            more = f'(", " {call})*' if several else ""
            calls = f'"[" {call} {more} "]"'
        else:
            separator = rule.separator if isinstance(rule, JsonCalls | NamedJson | Tagged) else "\n"
            more = f"({lark.literal(separator)} {call})*" if several and (separator or format.start) else ""
            calls = f"{call} {more}"
        skip_start = started or format.optional_start
        gap = lark.literal(format.gap)
        start = "" if skip_start else lark.literal(format.start)
        end = "" if format.optional_start else lark.literal(format.end)
        return f"{start} {gap} {calls} {gap} {end}"

    def _call(self, function: Function) -> str:
        rule, lark = self._format.rule, self._lark
        if isinstance(rule, JsonCalls):
            head = f'{{"name": {json_text(function.name)}, "{rule.arguments}": '
            return lark.rule(f'{lark.literal(head)} {self._object(function)} "}}"')
        if isinstance(rule, NamedJson):
            head = lark.literal(f"{rule.before}{rule.prefix}{function.name}")
            number = '":" /0|[1-9][0-9]{0,2}/' if rule.numbered else ""
            if rule.id_mark:
                number = f"({lark.literal(rule.id_mark)} /[a-zA-Z0-9]{{9}}/)?"
            tail = lark.literal(rule.after)
            return lark.rule(f"{head} {number} {lark.literal(rule.middle)} {self._object(function)} {tail}")
        if isinstance(rule, Tagged):
            head = lark.literal(f"{rule.before}{function.name}{rule.middle}")
            parameters = self._each_parameter(function, lambda *known: self._tagged(rule, *known), "")
            return lark.rule(f"{head} {parameters} {lark.literal(rule.after)}")
        parameters = self._each_parameter(function, self._keyword, ", ")
        return lark.rule(f'{lark.literal(function.name)} "(" {parameters} ")"')

    def _harmony(self, required: bool) -> str:
        lark = self._lark

        def call(function: Function) -> str:
            to, space = f"to=functions.{function.name}", '" "?'
            head = f"{lark.literal(f'<|channel|>commentary {to}')} {space} {lark.literal('<|constrain|>json')}"
            other = lark.literal(f" {to}<|channel|>commentary ")
            other += f' ({lark.literal("<|constrain|>json")} | "json")'
            return f"({head} | {other}) {lark.literal('<|message|>')} {self._object(function)}"

        over = "<|end|>"
        again = lark.literal("<|start|>assistant")
        head = lark.literal("<|channel|>analysis<|message|>")
        thoughts = f"({head} {lark.until(over)} {again})*"
        calls = [lark.rule(call(each)) for each in self._functions]
        if required:
            return f"{thoughts} ({' | '.join(calls)})"
        preamble = f"({lark.literal('<|channel|>commentary<|message|>')} {lark.until(over)} {again})?"
        answer = f"{lark.literal('<|channel|>final<|message|>')} {lark.text('<|end|>')}"
        return f"{thoughts} {preamble} ({' | '.join([*calls, answer])})"

    def _object(self, function: Function) -> str:
        """Returns an expression for the arguments as a JSON object."""
        schema = dict(function.parameters or {"properties": {}})
        where = f"{function.where}.parameters"
        if schema.setdefault("type", "object") != "object":
            raise RequestError(f"{where}.type={schema['type']!r:.60}: expected 'object'")
        if "properties" in schema and not any(key in schema for key in _COMPOSED):
            # A name that the function does not declare helps nobody.
            schema.setdefault("additionalProperties", False)
        return self._lark.json(schema, where)

    def _each_parameter(
        self, function: Function, write: Callable[[str, Mapping[str, Any], Mapping[str, Any], str], str], separator: str
    ) -> str:
        """Returns an expression for the parameters in their order; those that are not required may be missing."""
        schema, where = function.parameters or {}, f"{function.where}.parameters"
        if other := sorted(set(schema) - _PLAIN):
            raise RequestError(f"{where}.{other[0]}: this model's form of tool calls cannot force it: leave it out")
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise RequestError(f"{where}: expected properties as an object and required as a list")
        if unknown := [name for name in required if name not in list(properties)]:
            raise RequestError(f"{where}.required names {unknown[0]!r:.60}, which properties does not have")
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        lark = self._lark
        first = rest = ""  # what may follow where nothing, or something, stands before
        for name, value in reversed(list(properties.items())):
            place = f"{where}.properties.{name}"
            if not isinstance(value, Mapping):
                raise RequestError(f"{place}={value!r:.60}: expected a JSON schema, an object")
            one = lark.rule(write(name, value, definitions, place))
            then = f"{one} {rest}"
            after = f"{lark.literal(separator)} {then}"
            if name in required:
                first, rest = lark.rule(then), lark.rule(after)
            else:
                first = lark.rule(f"{then} | {first}" if first else f"({then})?")
                rest = lark.rule(f"{after} | {rest}" if rest else f"({after})?")
        return first

    def _tagged(
        self, rule: Tagged, name: str, schema: Mapping[str, Any], definitions: Mapping[str, Any], where: str
    ) -> str:
        lark = self._lark
        if re.search(r"[<>\"\n]", name):
            raise RequestError(f"{where}: this model's form of tool calls cannot write the name {name!r:.60}")
        bare = is_bare(schema)
        between = rule.value if bare or rule.json_value is None else rule.json_value
        head = lark.literal(f"{rule.key}{name}{between}")
        if not bare:
            return f"{head} {lark.json({**schema, **definitions}, where)} {lark.literal(rule.end)}"
        end = rule.end.rstrip()
        return f"{head} {lark.until(end, string_bodies(schema, where))} {lark.literal(rule.end[len(end) :])}"

    def _keyword(self, name: str, schema: Mapping[str, Any], definitions: Mapping[str, Any], where: str) -> str:
        if not (name.isidentifier() and name.isascii()):
            raise RequestError(f"{where}: this model's form of tool calls cannot write the name {name!r:.60}")
        return f'"{name}=" {self._lark.json({**schema, **definitions}, where)}'
