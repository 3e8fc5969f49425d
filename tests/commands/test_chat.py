"""`llm-infer chat`: its commands, text of several lines, and what stays of a conversation."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_infer.base.errors import UserError
from llm_infer.base.outputs import StreamChunk
from llm_infer.commands.chat import HELP, Conversation
from llm_infer.commands.line_input import LineInput
from llm_infer.decoding.sampling_params import SamplingParams

ROOT = Path(__file__).parents[2]


class Echo:
    """In place of an `LLM`: answers with the number of messages; "stop" interrupts, "long" does not fit."""

    def chat_prompt(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        if messages[-1]["content"] == "long":
            raise UserError("the prompt is too long")
        return messages

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[StreamChunk]:
        yield StreamChunk(0, str(len(prompt)), [1], None)
        if prompt[-1]["content"] == "stop":
            raise KeyboardInterrupt
        yield StreamChunk(0, "!", [1], "stop")


@pytest.fixture
def conversation() -> Conversation:
    return Conversation(Echo(), SamplingParams(), [])  # type: ignore[arg-type]


def contents(conversation: Conversation) -> list[str]:
    return [f"{message['role'][0]} {message['content']}" for message in conversation.messages]


def test_questions_and_answers_become_the_conversation(
    conversation: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("Hi", "stop", " ", "long", "more\nlines"):
        assert conversation.take(text)
    assert contents(conversation) == ["u Hi", "a 1!", "u stop", "a 3", "u more\nlines", "a 5!"]
    out, err = capsys.readouterr()
    assert out == "1!\n3\n5!\n"
    assert err == "(stopped)\nerror: the prompt is too long (/clear starts a new conversation)\n"


def test_the_system_message_stays_first_and_is_not_cleared(
    conversation: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("/system", "Hi", "/system Be brief.", "/system", "/regen", "/clear", "/system You rhyme.", "Ho"):
        assert conversation.take(text)
    assert contents(conversation) == ["s You rhyme.", "u Ho", "a 2!"]
    out, err = capsys.readouterr()
    assert out == "1!\n2!\n2!\n" and err == "no system message\nsystem: Be brief.\n(a new conversation)\n"


def test_an_answer_is_given_again(conversation: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("/regen", "Hi", "stop", "/regen"):
        conversation.take(text)
    assert contents(conversation) == ["u Hi", "a 1!", "u stop", "a 3"]
    assert capsys.readouterr().err.startswith("error: nothing was asked yet\n")


def test_conversations_are_saved_and_go_on(
    conversation: Conversation, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "c.json"
    for text in ("/system Ä", "Hi", f"/save {file}", "/reset", f"/load {file}", "Ho"):
        conversation.take(text)
    assert json.loads(file.read_text(encoding="utf-8")) == conversation.messages[:3]
    assert contents(conversation) == ["s Ä", "u Hi", "a 2!", "u Ho", "a 4!"]
    for text, said in (
        (f"/save {tmp_path}/no/c.json", "No such file"),
        ("/save", "/save needs the name of a file"),
        (f"/load {tmp_path}/none.json", "No such file"),
    ):
        capsys.readouterr()
        assert conversation.take(text)
        assert said in capsys.readouterr().err
    assert len(conversation.messages) == 5


def test_commands_are_listed_and_unknown_ones_named(
    conversation: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    assert conversation.take("/help") and conversation.take("/hlep me")
    assert capsys.readouterr().err == f"{HELP}\nunknown command /hlep: /help lists commands, /exit leaves\n"
    assert all(len(line) <= 80 for line in HELP.splitlines())
    assert not conversation.take("/exit") and not conversation.take("/quit") and not conversation.take(" /bye ")


def test_text_of_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = 'one\n"""two\nlines"""\n  """ three\n\nlines\n"""\nfour\\\nlines\n"""five""" rest\nsix\\'
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    with LineInput() as lines:
        found = list(iter(lines.read, None))
    assert found == ["one", "two\nlines", " three\n\nlines\n", "four\nlines", "five"]


def test_a_terminal_has_prompts_and_a_history(tmp_path: Path) -> None:
    code = "from llm_infer.commands.line_input import LineInput\n"
    code += "with LineInput() as lines:\n    while (text := lines.read()) is not None: print('got', repr(text))"
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=child,
        stdout=child,
        stderr=child,
        env=os.environ | {"PYTHONPATH": str(ROOT), "LLM_INFER_CACHE": str(tmp_path), "TERM": "dumb"},
        start_new_session=True,
    )
    os.close(child)
    seen = b""

    def until(text: bytes) -> None:
        nonlocal seen
        end = time.monotonic() + 30
        while text not in seen and time.monotonic() < end and select.select([parent], [], [], 30)[0]:
            seen += os.read(parent, 1000)
        assert text in seen, seen
        seen = seen.partition(text)[2]

    until(b"> ")
    os.write(parent, b'"""a\n')
    until(b"... ")
    os.write(parent, b'b"""\n')
    until(b"got 'a\\nb'")
    until(b"> ")
    os.write(parent, b"\x04")
    assert process.wait(timeout=30) == 0
    os.close(parent)
    assert '"""a' in (tmp_path / "chat_history").read_text()
