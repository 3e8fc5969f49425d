"""Chat templates render as transformers renders them, and a bad or hostile one fails its request with one line."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from llm_infer.base.errors import RequestError
from llm_infer.text import chat_template
from llm_infer.text.chat_template import apply_chat_template
from llm_infer.text.template_process import Limits, TemplateProcesses
from llm_infer.text.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def small_limits() -> Iterator[TemplateProcesses]:
    """Reached sooner than the usual ones."""
    processes = TemplateProcesses(1, Limits(cpu_seconds=1, memory=1 << 28))
    yield processes
    processes.close()


def render(template: str, messages: Any = HELLO, **variables: Any) -> str:
    return apply_chat_template(template, messages, **variables)


def test_the_default_models_template(tokenizer: Tokenizer) -> None:
    assert tokenizer.chat_template is not None
    text = render(tokenizer.chat_template, [*HELLO, {"role": "assistant", "content": "Yes?"}, *HELLO])
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(1) == 5 and ids.count(2) == 4
    short = render(tokenizer.chat_template, [{"role": "system", "content": "S"}], add_generation_prompt=False)
    assert short == "<|im_start|>system\nS<|im_end|>\n"


def test_white_space_globals_and_filters() -> None:
    assert (
        render("{% for m in messages %}\n    {% if true %}\n{{ m.role }}\n    {% endif %}\n{% endfor %}\n") == "user\n"
    )
    assert render("{{ bos_token }}|{{ eos_token }}|{{ add_generation_prompt }}", bos_token="<s>") == "<s>||True"
    assert render("{{ tools | tojson }}", tools=[{"n": "<é>"}]) == '[{"n": "<é>"}]'
    assert render("{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": [\n  2\n ],\n "b": 1\n}'
    assert re.fullmatch(r"\d{4}-\d\d", render("{{ strftime_now('%Y-%m') }}"))
    assert render("{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 3 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "013"  # fmt: skip  # noqa: E501
    assert (
        render("{% for i in [5, 6] %}{{ loop.index }}/{{ loop.length }}{{ '.' if loop.last else ',' }}{% endfor %}")
        == "1/2,2/2."
    )
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "Hi"
    assert (
        render("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}")
        == "1"
    )
    assert render("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(1) }}{{ thinking }}", thinking="yes") == "<1>yes"
    assert (
        render("{{ tools is none }}{{ messages[0]['content'] | trim | length }}{{ 1700000000000 | string }}")
        == "True21700000000000"
    )


def test_content_as_parts() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert render("{% for m in messages %}{{ m.content }}{% endfor %}", parts) == "a\nb"
    for_parts = "{% for m in messages %}{% for p in m['content'] %}[{{ p['text'] }}]{% endfor %}{% endfor %}"
    assert render(for_parts, parts) == "[a\nb]"
    assert render(for_parts) == "[Hi]"


def test_tool_calls_need_no_content() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    text = render("{{ messages[0].content }}{{ messages[0].tool_calls[0].function | tojson }}", [call])
    assert text == '{"name": "f", "arguments": {"x": 1}}'


def test_null_and_what_clients_send_beside() -> None:
    shown = "{% for m in messages %}{{ m | tojson(sort_keys=true) }}{% endfor %}"
    for role in ("assistant", "tool"):
        assert render(shown, [{"role": role, "content": None}]) == f'{{"content": "", "role": "{role}"}}'
        assert render(shown, [{"role": role}]) == f'{{"content": "", "role": "{role}"}}'
    more = {"name": None, "refusal": None, "tool_calls": None}
    assert render(shown, [{"role": "user", "content": "x", **more}]) == '{"content": "x", "role": "user"}'
    for name in ("reasoning_content", "reasoning", "thinking"):
        text = render("{{ messages[0].reasoning_content }}{{ messages[0].thinking }}", [{**HELLO[0], name: "T"}])
        assert text == "TT"


def called(arguments: Any, **function: Any) -> list[dict[str, Any]]:
    function = {"name": "f", "arguments": arguments, **function}
    return [*HELLO, {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}]


@pytest.mark.parametrize(
    ("arguments", "as_object", "as_text"),
    [
        ({"b": [1, "é"]}, '{"b": [1, "é"]}', '{"b": [1, "é"]}'),
        ('{"b":[1, "é"]}', '{"b": [1, "é"]}', '{"b":[1, "é"]}'),
        ("", "{}", "{}"),
        (None, "{}", "{}"),
        ("{}", "{}", "{}"),
        ('{"a": ', '"{\\"a\\": "', '{"a": '),  # what a model wrote and is no JSON
        ("[1]", '"[1]"', "[1]"),
        ("[" * 100_000, '"' + "[" * 100_000 + '"', "[" * 100_000),
    ],
    ids=lambda value: str(value)[:12],
)
def test_arguments_are_in_the_form_that_the_template_needs(arguments: Any, as_object: str, as_text: str) -> None:
    loop = "{% for m in messages %}{% for c in m.tool_calls %}%s{% endfor %}{% endfor %}"
    assert render(loop.replace("%s", "{{ c.function.arguments | tojson }}"), called(arguments)) == as_object
    assert render(loop.replace("%s", "{{ '' + c.function.arguments }}"), called(arguments)) == as_text
    flat = [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}]
    either = "{% set f = c.function or c %}"
    assert render(loop.replace("%s", either + "{{ f.arguments | tojson }}"), flat) == as_object


def test_a_template_that_shows_calls_only_beside_null_gets_null() -> None:
    calls = "{% if m.content is none %}{{ m.tool_calls[0].function.arguments | tojson }}{% endif %}"
    one = f"{{% for m in messages %}}{calls}{{% endfor %}}"
    for content in ({}, {"content": None}, {"content": ""}):
        assert render(one, [{**called('{"x": 1}')[1], **content}]) == '{"x": 1}'
    assert render(one, [{**called('{"x": 1}')[1], "content": "I look it up."}]) == ""


def test_calls_do_not_change_the_callers_messages() -> None:
    messages = called('{"x": 1}')
    render("{{ messages }}", messages)
    assert messages == called('{"x": 1}')


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hi", "messages is a str: expected a list"),
        ({"role": "user"}, "messages is a dict"),
        (["Hi"], r"messages\[0\] is a str: expected an object"),
        ([{"content": "x"}], r"messages\[0\].role is None"),
        ([*HELLO, {"role": 3, "content": "x"}], r"messages\[1\].role is 3"),
        ([{"role": "assistant", "tool_calls": "f"}], r"messages\[0\].tool_calls is 'f': expected a list of"),
        ([{"role": "assistant", "tool_calls": ["f"]}], r"messages\[0\].tool_calls is \['f'\]"),
        ([{"role": "assistant", "tool_calls": [{"function": "f"}]}], r"messages\[0\].tool_calls is "),
        ([{"role": "user"}], r"messages\[0\].content is NoneType"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content is int"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content\[0\] is of type 'str'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\] is of type 'image_url'.*text only"),
    ],
)
def test_malformed_messages(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        render("{{ messages }}", messages)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "not valid Jinja, line 1"),
        ("{{ raise_exception('roles must\n alternate') }}", "refuses these messages: roles must alternate$"),
        ("{{ messages[7].content }}", "uses something these messages do not have"),
        ("{{ 1 / 0 }}", "failed with ZeroDivisionError"),
        ("{{ messages[0] | tojson(indent='x' * 3) }}{{ undefined | tojson }}", "failed with TypeError"),
        ("{% include 'x' %}", "failed with TypeError: no loader"),
        # ways out of the sandbox
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "was stopped: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "was stopped"),
        ("{{ ''['__class__'] }}", "stopped: access to attribute '__class__'"),
        ("{{ messages | attr('__class__') }}", "stopped: access to attribute '__class__'"),
        ("{{ raise_exception.__globals__ }}", "stopped"),
        ("{{ self.__init__.__globals__ }}", "stopped"),
        ("{{ cycler.__init__.__globals__ }}", "stopped"),
        ("{{ '{0.__class__}'.format(1) }}", "stopped"),
        ("{{ messages[0].update(x=1) }}", "stopped"),
        # more work than anybody needs
        ("{% for i in range(10**9) %}x{% endfor %}", "failed with OverflowError: Range too big"),
        ("{% for i in range(10**7) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 1 s of processor time"),
        ("{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "RecursionError"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}", "1 s of processor time"),
        ("{{ 'x' * 10**9 }}", "stopped: it takes more than 256 MiB of memory"),
        ("{{ [0] * 10**9 }}", "stopped: it takes more than 256 MiB of memory"),
        ("{{ 10**(10**10) }}", "more than 1 s of processor time"),
        ("{{ 'x'.ljust(10**9) }}", "stopped"),
        ("{{ 'x' | center(1000000000) }}", "stopped"),
        ("{{ lipsum(5) }}", "do not have"),
        ("{% set x = namespace(t='x' * 100000) %}{% for i in range(99) %}{% set x.t = x.t + x.t %}{% endfor %}", "stopped"),
        ("{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}", "puts out more than"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "puts out more than"),
    ],
)  # fmt: skip
def test_bad_templates_fail_with_one_line(
    template: str, message: str, small_limits: TemplateProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "PROCESSES", small_limits)
    start = time.perf_counter()
    with pytest.raises(RequestError, match=message) as raised:
        render(template)
    assert "\n" not in str(raised.value)
    assert time.perf_counter() - start < 20


def test_long_conversations_fit_the_budget() -> None:
    messages = [{"role": "user", "content": "Hi"}] * 800
    looped_twice = "{% for m in messages %}{% for n in messages %}{% endfor %}{{ m.content }}{% endfor %}"
    assert render(looped_twice, messages) == "Hi" * 800


def test_the_callers_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    render("{{ messages[0].content }}", messages)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
