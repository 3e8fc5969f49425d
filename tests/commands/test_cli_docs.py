"""docs/cli.md: every command and flag is there, and every example is one that the program takes."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from llm_infer.commands import app
from llm_infer.commands.user_file import user_defaults
from llm_infer.options import settings

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
README = (Path(__file__).parents[2] / "README.md").read_text()
EXAMPLES = re.findall(r"^    .*?(llm-infer .*)$", PAGE + README, flags=re.MULTILINE)
PROGRAM: Any = typer.main.get_command(app.app)


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words begin with, and the rest of them."""
    command, rest = PROGRAM, words
    while rest and rest[0] in getattr(command, "commands", {}):
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_taken(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLM_INFER_NUM_THREADS", raising=False)
    (tmp_path / "model.gguf").touch()
    command, rest = command_of(shlex.split(example, comments=True)[1:])
    if command is PROGRAM:
        assert rest in (["--install-completion"], ["--show-completion"])
        return
    context = command.make_context("x", rest)
    assert context.params.keys() >= {"debug"}


def test_every_command_has_an_example() -> None:
    shown = {command_of(shlex.split(example, comments=True)[1:])[0].name for example in EXAMPLES if example in PAGE}
    commands = [*PROGRAM.commands.values(), *PROGRAM.commands["bench"].commands.values()]
    assert shown >= {command.name for command in commands if not hasattr(command, "commands")}
    for name in PROGRAM.commands:
        assert f"### {name}\n" in PAGE


def test_every_flag_of_generate_and_chat_that_is_no_engine_setting_is_explained() -> None:
    for name in ("generate", "chat"):
        ours = [param for param in PROGRAM.commands[name].params if param.name not in settings().keys() - {"seed"}]
        for param in ours:
            for flag in param.opts:
                assert not flag.startswith("-") or f"`{flag}`" in PAGE or f" {flag} " in PAGE, flag


def test_the_file_of_defaults_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.search(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
    assert found and tomllib.loads(found[1])
    (tmp_path / "config.toml").write_text(found[1])
    monkeypatch.setenv("LLM_INFER_CONFIG", str(tmp_path / "config.toml"))
    defaults = user_defaults()
    assert defaults["generate"]["config"] == str(tmp_path / "cpu.toml")
    assert defaults["chat"]["system"] == "Be brief." and "system" not in defaults["generate"]
