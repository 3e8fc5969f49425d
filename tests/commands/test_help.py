"""Help, completion and messages: overviews are whole, values have English names, names that are nearly right are suggested."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from llm_infer.commands import app, completion, interactive
from llm_infer.options import EngineOptions

ROOT = Path(__file__).parents[2]


def every_command() -> dict[str, Any]:
    """All commands, by what is typed: also groups, and the program itself as ""."""
    found: dict[str, Any] = {}

    def visit(name: str, command: Any) -> None:
        found[name] = command
        for below, one in getattr(command, "commands", {}).items():
            visit(f"{name} {below}".strip(), one)

    visit("", typer.main.get_command(app.app))
    return found


@pytest.mark.parametrize("name", every_command())
def test_help_is_whole_and_has_no_python_types(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["llm-infer", *name.split(), "--help"])
    with pytest.raises(SystemExit):
        app.main()
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: llm-infer {name}".strip())
    assert not re.search(r"<\w+>|list\[|\b(str|int|float|None|Optional)\b", text)
    assert "..." not in text.split("Commands:")[-1] or "{MODELS}..." in text
    assert max(map(len, text.splitlines())) <= 80
    first = re.split(r"\.(?:\s|$)", every_command()[name].help)[0]
    assert len(first) < 60, f"the first sentence of {name!r} has {len(first) + 1} characters"


def test_shells_complete_commands_and_models(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in ("m-Q4_0.gguf", "m-Q8_0.gguf", "model.safetensors"):
        (snapshot / file).touch()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_CACHE", None)
    program = "import sys; sys.argv = ['llm-infer']; from llm_infer.commands.app import main; main()"

    def completed(shell: str, line: str) -> list[str]:
        words = {"bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}}.get(
            shell, {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        )
        result = subprocess.run(
            [sys.executable, "-c", program],
            env=environment | words | {"_LLM_INFER_COMPLETE": f"complete_{shell}"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return re.findall(r"[\w/:.@-]{3,}", result.stdout)

    assert completed("bash", "llm-infer ge") == ["generate"]
    models = ["org/name:Q4_0", "org/name:Q8_0", "org/name"]
    assert completed("bash", "llm-infer chat --model org") == models
    assert set(models) - {"org/name"} <= set(completed("fish", "llm-infer generate -m org"))
    assert "org/name" in " ".join(completed("zsh", "llm-infer generate -m org"))


def test_the_cache_of_the_hub_is_found_as_its_library_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/h")
    assert completion._hub_cache() == Path("/h/.cache/huggingface/hub")
    for name, place in (("XDG_CACHE_HOME", "/x/huggingface/hub"), ("HF_HOME", "/x/hub"), ("HF_HUB_CACHE", "/x")):
        monkeypatch.setenv(name, "/x")
        assert completion._hub_cache() == Path(place)


@pytest.mark.parametrize(
    ("name", "load_format", "said"),
    [
        (
            "smollm2-135-instruct",
            "auto",
            "did you mean 'smollm2-135m-instruct'? (`llm-infer list` shows what is here, ",
        ),
        ("smollm2-135m", "auto", "without weights: did you mean 'smollm2-135m-instruct'?"),
        ("Opt-125", "auto", "did you mean 'opt-125m'? (`llm-infer list` shows what is here, `llm-infer models` "),
        (
            "llama-3.1-8",
            "dummy",
            "no architecture 'llama-3.1-8': did you mean 'llama-3.1-8b'? `llm-infer models` lists",
        ),
    ],
)
def test_a_name_that_is_nearly_right_is_suggested(
    name: str, load_format: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["llm-infer", "generate", "Hi", "-m", name, "--load-format", load_format])
    with pytest.raises(SystemExit):
        app.main()
    assert said in capsys.readouterr().err


def test_a_device_that_is_not_here_is_named_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.toml"
    file.write_text('device = "gpu"\n')
    for command in (["generate", "Hi"], ["chat"], ["bench", "offline"]):
        for flags in (["--config", str(file)], ["--device", "gpu"]):
            monkeypatch.setattr(sys, "argv", ["llm-infer", *command, *flags])
            with pytest.raises(SystemExit):
                app.main()
            said = capsys.readouterr().err
            typed = flags[0] == "--device"
            assert said.startswith(
                "error: device='gpu': JAX found" if typed else f"error: --config {file}: device='gpu'"
            )
            assert said.endswith(", in the file or with --device\n") != typed


def test_random_weights_without_a_tokenizer_say_that_these_are_ids(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, said in (("<256>", True), ("word", False)):
        llm = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids, text=text: text))
        monkeypatch.setattr("llm_infer.llm.LLM.of", lambda _, llm=llm: llm)
        interactive.interactive_llm(EngineOptions("opt-125m", load_format="dummy"))
        assert ("numbers in the answer are ids of tokens" in capsys.readouterr().err) == said
