"""The forms in which model families write tool calls: one table for the scanner, which reads them, and the grammar, which forces
them."""

from __future__ import annotations

from collections.abc import Iterable

from llm_infer.base.errors import RequestError
from llm_infer.text.output_parsing.rules import Harmony, JsonCalls, NamedJson, Pythonic, Tagged, ToolFormat

_XML = Tagged(
    before="<function=",
    middle=">\n",
    key="<parameter=",
    value=">\n",
    end="\n</parameter>\n",
    after="</function>",
    padding="\n",
)

_DSML = Tagged(
    before='<｜DSML｜invoke name="',
    middle='">\n',
    key='<｜DSML｜parameter name="',
    value='" string="true">',
    json_value='" string="false">',
    end="</｜DSML｜parameter>\n",
    after="</｜DSML｜invoke>",
    separator="\n",
)

# The first row whose signs a template has is taken: those with more particular signs stand first.
FORMATS: tuple[ToolFormat, ...] = (
    ToolFormat(
        name="openai",
        aliases=("harmony", "gptoss", "gpt-oss"),
        rule=Harmony(),
        signs=("<|channel|>", "<|message|>", "functions."),
    ),
    ToolFormat(
        name="deepseek_v3",
        aliases=("deepseek_r1",),
        start="<｜tool▁calls▁begin｜>",
        end="<｜tool▁calls▁end｜>",
        rule=NamedJson(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n", "\n```<｜tool▁call▁end｜>", separator="\n"
        ),
        signs=("<｜tool▁calls▁begin｜>", "```json"),
    ),
    ToolFormat(
        name="deepseek_v31",
        start="<｜tool▁calls▁begin｜>",
        end="<｜tool▁calls▁end｜>",
        rule=NamedJson("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
        signs=("<｜tool▁calls▁begin｜>",),
    ),
    ToolFormat(
        name="deepseek_v32",
        start="<｜DSML｜function_calls>",
        end="</｜DSML｜function_calls>",
        gap="\n",
        rule=_DSML,
        signs=("｜DSML｜", "function_calls>"),
    ),
    ToolFormat(
        name="deepseek_v4",
        start="<｜DSML｜tool_calls>",
        end="</｜DSML｜tool_calls>",
        gap="\n",
        rule=_DSML,
        signs=("｜DSML｜", "tool_calls>"),
    ),
    ToolFormat(
        name="kimi_k2",
        start="<|tool_calls_section_begin|>",
        end="<|tool_calls_section_end|>",
        rule=NamedJson(
            "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
            prefix="functions.",
            numbered=True,
        ),
        ids="number",
        signs=("<|tool_calls_section_begin|>",),
    ),
    ToolFormat(
        name="glm47",
        start="<tool_call>",
        each="",
        rule=Tagged(
            before="",
            middle="",
            key="<arg_key>",
            value="</arg_key><arg_value>",
            end="</arg_value>",
            after="</tool_call>",
        ),
        signs=("<tool_call>", "</arg_key><arg_value>"),
    ),
    ToolFormat(
        name="glm45",
        start="<tool_call>",
        each="\n",
        rule=Tagged(
            before="",
            middle="\n",
            key="<arg_key>",
            value="</arg_key>\n<arg_value>",
            end="</arg_value>\n",
            after="</tool_call>",
        ),
        signs=("<tool_call>", "<arg_key>"),
    ),
    ToolFormat(
        name="seed_oss",
        start="<seed:tool_call>",
        end="</seed:tool_call>",
        gap="\n",
        rule=Tagged(
            before="<function=",
            middle=">\n",
            key="<parameter=",
            value=">",
            end="</parameter>\n",
            after="</function>",
            separator="\n",
        ),
        signs=("<seed:tool_call>", "<parameter="),
    ),
    ToolFormat(
        name="minimax_m2",
        start="<minimax:tool_call>",
        end="</minimax:tool_call>",
        gap="\n",
        rule=Tagged(
            before='<invoke name="',
            middle='">\n',
            key='<parameter name="',
            value='">',
            end="</parameter>\n",
            after="</invoke>",
            separator="\n",
        ),
        signs=("<minimax:tool_call>", "<invoke name="),
    ),
    ToolFormat(
        name="qwen3_coder",
        aliases=("qwen3_xml", "qwen3_5", "step3p5", "nemotron_v3"),
        start="<tool_call>",
        end="</tool_call>",
        gap="\n",
        each="\n",
        rule=_XML,
        signs=("<tool_call>", "<function=", "<parameter="),
    ),
    ToolFormat(
        name="functionary_v3",
        start="<function=",
        each="",
        rule=NamedJson("", ">", "</function>"),
        signs=("<function=", "</function>"),
    ),
    ToolFormat(
        name="mistral",
        start="[TOOL_CALLS]",
        each="",
        rule=NamedJson("", "[ARGS]", "", id_mark="[CALL_ID]", tight=True, or_json=True),
        ids="nine",
        signs=("[TOOL_CALLS]", "[ARGS]"),
    ),
    ToolFormat(
        name="mistral_old",
        start="[TOOL_CALLS]",
        rule=JsonCalls(listed=True),
        ids="nine",
        signs=("[TOOL_CALLS]",),
    ),
    ToolFormat(
        name="granite",
        start="<|tool_call|>",
        rule=JsonCalls(listed=True),
        signs=("<|tool_call|>",),
    ),
    ToolFormat(
        name="nemotron",
        start="<TOOLCALL>",
        end="</TOOLCALL>",
        rule=JsonCalls(listed=True),
        signs=("<TOOLCALL>",),
    ),
    ToolFormat(
        name="lfm2",
        aliases=("pythonic_tagged",),
        start="<|tool_call_start|>",
        end="<|tool_call_end|>",
        rule=Pythonic(),
        signs=("<|tool_call_start|>",),
    ),
    ToolFormat(
        name="apriel",
        aliases=("jamba",),
        start="<tool_calls>",
        end="</tool_calls>",
        rule=JsonCalls(listed=True),
        signs=("<tool_calls>[",),
    ),
    ToolFormat(
        name="minimax",
        aliases=("minimax_m1",),
        start="<tool_calls>",
        end="</tool_calls>",
        gap="\n",
        rule=JsonCalls(separator="\n"),
        signs=("<tool_calls>",),
    ),
    ToolFormat(
        name="olmo3",
        start="<function_calls>",
        end="</function_calls>",
        gap="\n",
        rule=Pythonic(listed=False),
        signs=("<function_calls>",),
    ),
    ToolFormat(
        name="smollm2",
        start="<tool_call>",
        end="</tool_call>",
        rule=JsonCalls(listed=True),
        signs=("<tool_call>[",),
    ),
    ToolFormat(
        name="hermes",
        aliases=("qwen", "qwen25", "qwen2_5", "qwen3", "granite4"),
        start="<tool_call>",
        end="</tool_call>",
        gap="\n",
        each="\n",
        rule=JsonCalls(),
        signs=("<tool_call>", "</tool_call>", "arguments"),
        others=("<invoke name=",),
    ),
    ToolFormat(
        name="llama3_json",
        aliases=("llama3", "llama4_json", "llama"),
        start="<|python_tag|>",
        optional_start=True,
        rule=JsonCalls(arguments="parameters", separator="; "),
        signs=('{"name": function name, "parameters"',),
    ),
    ToolFormat(
        name="llama4_pythonic",
        aliases=("llama4",),
        start="<|python_start|>",
        end="<|python_end|>",
        optional_start=True,
        rule=Pythonic(),
        signs=("<|python_start|>",),
    ),
    ToolFormat(name="pythonic", rule=Pythonic(), signs=("[func_name1(params_name1=",)),
    ToolFormat(name="json", aliases=("generic",), rule=JsonCalls(listed=True)),
)

GENERIC = "json"
"""The format for models that know none: a list of JSON objects. It is read only where it is forced."""


def tool_format(name: str) -> ToolFormat:
    """Returns the format of a name or alias.

    Raises:
        RequestError: there is none.
    """
    for each in FORMATS:
        if name == each.name or name in each.aliases:
            return each
    names = ", ".join(each.name for each in FORMATS)
    raise RequestError(f"tool_call_parser={name!r:.60}: expected one of {names}")


def format_of_template(template: str) -> ToolFormat | None:
    """Returns the format of the calls that a chat template shows; None if it shows none that is known."""

    def shows(each: ToolFormat) -> bool:
        wrong = any(sign in template for sign in each.others)
        return bool(each.signs) and not wrong and all(sign in template for sign in each.signs)

    return next(filter(shows, FORMATS), None)


def need_special_tokens(markers: Iterable[str], special_tokens: Iterable[str]) -> bool:
    """Checks whether a model writes some of these markers as special tokens, which text leaves out unless asked."""
    return not set(special_tokens).isdisjoint(markers)
