"""Whatever a user types as a file, or writes into one, ends in a message."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_infer.base.errors import UserError
from llm_infer.base.files import is_there, parsed_json, read_json, read_text, read_toml, typed_path
from llm_infer.commands.interactive import read_conversation
from llm_infer.options import EngineOptions, read_options
from llm_infer.weights.model_names import why_unknown

NAMES = ["~nobody-of-this-name/x", "a" * 5000, "a\0b", "", "\udcff"]
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("name", NAMES)
def test_names_that_no_file_has(name: str) -> None:
    assert not is_there(name) or name == ""
    for read in (read_text, read_json, read_toml):
        with pytest.raises(UserError, match=r"^--file: "):
            read(typed_path(name), "--file")
    with pytest.raises(UserError):
        read_options(name)
    if name:
        assert why_unknown(name) is not None


def test_what_is_no_text_json_or_toml(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"--file is not UTF-8 text: .* at byte 0"):
        read_toml(file, "--file")
    file.write_text("a = " + DEEP)
    with pytest.raises(UserError, match="nested too deep"):
        read_toml(file, "--file")
    for text, problem in [
        (DEEP, "nested too deep"),
        ("{", "not valid JSON"),
        ('"\\ud800"', "surrogate"),
        ("9" * 5000, "JSON"),
    ]:
        with pytest.raises(UserError, match=problem):
            parsed_json(text, "--file")


@pytest.mark.parametrize(
    "text",
    [
        '[{"role": "user"}]',
        '[{"role": ["x"], "content": "a"}]',
        '[{"role": "user", "content": null}]',
        "[]",
        "{}",
        DEEP,
    ],
)
def test_conversations_that_are_none(text: str, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"^/load "):
        read_conversation(str(file), "/load")


@pytest.mark.parametrize("config", [{1: 1, "a": 2}, {"num_speculative_tokens": None}, {"prompt_lookup_min": None}])
def test_speculation_of_wrong_types(config: dict) -> None:
    with pytest.raises(UserError):
        EngineOptions(speculative_config=config)
