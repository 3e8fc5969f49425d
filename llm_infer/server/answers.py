"""How the answer of one chat is read: what of it is reasoning, text and tool calls, and what it is made to be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llm_infer.server.errors import bad_request
from llm_infer.server.protocol import ChatRequest
from llm_infer.text.output_parsing.call_grammar import call_grammar
from llm_infer.text.output_parsing.formats import (
    GENERIC,
    ToolFormat,
    format_of_template,
    need_special_tokens,
    tool_format,
)
from llm_infer.text.output_parsing.functions import Function, functions_of
from llm_infer.text.output_parsing.pieces import Piece, ReasoningText
from llm_infer.text.output_parsing.reasoning import (
    ReasoningFormat,
    reasoning_format,
    reasoning_of_template,
    starts_in_reasoning,
)
from llm_infer.text.output_parsing.scanner import OutputScanner
from llm_infer.text.tokenizer import Tokenizer

TAIL = 64
"""Tokens at the end of a prompt that say whether its answer begins with reasoning."""


class Formats:
    """The forms in which a model writes calls and reasoning: those of its template, or those that the user names.

    Args:
        template: the chat template, if there is one.
        tools, reasoning: names of formats; "none" switches one off.

    Raises:
        UserError: there is no format of that name.
    """

    def __init__(self, template: str | None, tools: str | None = None, reasoning: str | None = None) -> None:
        self.tools = _named(tools, tool_format, format_of_template, template)
        self.reasoning = _named(reasoning, reasoning_format, reasoning_of_template, template)


def _named(name: str | None, by_name: Any, of_template: Any, template: str | None) -> Any:
    if name == "none":
        return None
    if name is not None:
        return by_name(name)
    return None if template is None else of_template(template)


@dataclass(frozen=True, slots=True)
class Reading:
    """How the answers of one chat are read.

    Attributes:
        tools: how calls are written; None if there are none to look for.
        reasoning: how reasoning is written; None if it stays in the text.
        in_reasoning: the answer begins within it.
        functions: what may be called.
        hides_reasoning: nobody wants to see it.
        parallel: there may be several calls.
        with_special_tokens: the text has to be asked for with special tokens.
        endings: texts of the tokens that end an answer, which are then in it.
    """

    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None
    in_reasoning: bool = False
    functions: Mapping[str, Function] = field(default_factory=dict)
    hides_reasoning: bool = False
    parallel: bool = True
    with_special_tokens: bool = False
    endings: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether everything is text."""
        return self.tools is None and self.reasoning is None

    def wanted(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Returns the pieces that the client is to see."""
        return [piece for piece in pieces if not (self.hides_reasoning and isinstance(piece, ReasoningText))]

    def scanner(self) -> OutputScanner:
        """Makes what takes one answer apart."""
        functions = {name: each.parameters for name, each in self.functions.items()} if self.tools else None
        return OutputScanner(
            self.tools, self.reasoning, in_reasoning=self.in_reasoning, parallel=self.parallel, functions=functions
        )

    def shown(self, text: str, finish_reason: str | None) -> str:
        """Returns the text without the token that ended it."""
        if finish_reason == "stop" and not self.is_plain:
            for ending in self.endings:
                if text.endswith(ending):
                    return text.removesuffix(ending)
        return text


def reading_of(
    body: ChatRequest, wanted: list[dict[str, Any]], formats: Formats, tokenizer: Tokenizer, prompt: list[int]
) -> tuple[Reading, str | None]:
    """Returns how answers to a request are read, and the grammar that they must follow, if any.

    Args:
        body: the request.
        wanted: its tools, by `wanted_tools`.
        formats: those of the model.
        tokenizer: the model's.
        prompt: its ids; their end says whether the answer begins within reasoning.

    Raises:
        RequestError: the tools are malformed.
        ApiError: the model knows no calls, or they cannot be combined with something else.
    """
    tools, grammar, functions = None, None, {}
    formed = body.structured_outputs or (body.response_format and body.response_format.type != "text")
    # A form of the whole answer leaves no room for thoughts.
    reasoning = None if formed else formats.reasoning
    if not wanted and reasoning is None:
        return Reading(), None
    parallel = body.parallel_tool_calls is not False
    tail = tokenizer.decode(prompt[-TAIL:], skip_special_tokens=False)
    in_reasoning = starts_in_reasoning(tail, reasoning)
    if wanted:
        functions = functions_of(wanted)
        choice, name = _choice(body)
        tools = formats.tools
        if tools is None:
            if choice == "auto":
                raise bad_request(
                    "this model's chat template knows no tools: ask with tool_choice required or a function's name, or start "
                    "the server with --tool-call-parser and --chat-template",
                    "tools",
                    "unsupported_parameter",
                )
            tools = tool_format(GENERIC)
        grammar = call_grammar(
            tools,
            list(functions.values()),
            choice=choice,
            name=name,
            parallel=parallel,
            special_tokens=tokenizer.special_tokens,
            reasoning=reasoning,
            in_reasoning=in_reasoning,
        )
        if grammar is not None and formed:
            raise bad_request("forced tool calls and a form of the answer exclude each other", "tools", "invalid_value")
    markers = [*(tools.markers if tools else ()), *(reasoning.markers if reasoning else ())]
    with_special = need_special_tokens(markers, tokenizer.special_tokens)
    endings = tuple(tokenizer.decode([token], skip_special_tokens=False) for token in sorted(tokenizer.eos_token_ids))
    return Reading(
        tools,
        reasoning,
        in_reasoning,
        functions,
        hides_reasoning=body.include_reasoning is False,
        parallel=parallel,
        with_special_tokens=with_special,
        endings=endings,
    ), grammar


def wanted_tools(body: ChatRequest) -> list[dict[str, Any]]:
    """Returns the tools that the template is to show."""
    if body.tools is None or body.tool_choice == "none":
        if body.tool_choice not in (None, "none", "auto") and not body.tools:
            raise bad_request("tool_choice needs tools", "tool_choice", "invalid_value")
        return []
    return [tool.model_dump(exclude_none=True) for tool in body.tools]


def _choice(body: ChatRequest) -> tuple[Any, str | None]:
    choice = body.tool_choice
    if choice is None or isinstance(choice, str):
        return choice or "auto", None
    return "required", choice.function.name
