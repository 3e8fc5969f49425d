"""The command line: bad input gives one clear line and a non-zero exit, answers go to stdout and nothing else does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm_infer.base import accelerators
from llm_infer.base.outputs import Logprob, StreamChunk
from llm_infer.commands import app, doctor, generate


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `llm-infer ARGS` in this process."""
    monkeypatch.setattr(sys, "argv", ["llm-infer", *args])
    with pytest.raises(SystemExit) as stop:
        app.main()
    out, err = capsys.readouterr()
    code = stop.value.code
    return (code if isinstance(code, int) else 0 if code is None else 1), out, err


def assert_one_line_error(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert code != 0
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("Loading weights")]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "nan"], ["temperature"]),
        (["--temperature", "-1"], ["temperature"]),
        (["--top-p", "1.5"], ["top_p"]),
        (["--max-tokens", "0"], ["max_tokens"]),
        (["--min-p", "2"], ["min_p"]),
        (["--stop", ""], ["stop"]),
        (["--logprobs", "99"], ["logprobs"]),
        (["--json-schema", "missing.json"], ["missing.json"]),
        (["--grammar", "missing.lark"], ["--grammar missing.lark: No such file"]),
        (["--regex", ""], ["--regex", "expected a text that is not empty"]),
        (["--regex", "a", "--choice", "b"], ["--regex and --choice: an answer follows one of them"]),
        (["--no-such-flag"], ["--no-such-flag", "(see llm-infer generate --help)"]),
        (["--max-tokens", "many"], ["--max-tokens"]),
        (["--model", "missing.gguf"], ["missing.gguf"]),
        (["--model", "opt-125m"], ["architecture without weights", "--load-format dummy"]),
        (["again"], ["unexpected extra argument", "stands in quotes"]),
        (["--max-model-len", "1"], ["max_model_len"]),
    ],
)
def test_bad_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], words: list[str]
) -> None:
    assert_one_line_error(run(monkeypatch, capsys, "generate", "hello", *flags), *words)


@pytest.mark.parametrize("name", ["missing.gguf", "./missing", "/missing/directory", "missing"])
def test_a_model_that_is_not_there_is_refused_before_jax_is_imported(name: str, tmp_path: Path) -> None:
    code = "import sys; from llm_infer.commands import app; sys.argv = ['llm-infer', *sys.argv[1:]]\n"
    code += "try: app.main()\nexcept SystemExit: print('jax' in sys.modules)"
    commands = (["generate", "hello", "--model"], ["chat", "--model"], ["convert"], ["bench", "step", "--model"])
    commands += (["bench", "quality", "--reference"],)
    for command in commands:
        arguments = [*command, name, *(["out"] if command == ["convert"] else [])]
        result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
        assert result.stdout == "False\n", arguments
        assert result.stderr.startswith(f"error: no model {name!r}: there is no such file or directory")


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_empty_prompt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], prompt: str) -> None:
    assert_one_line_error(run(monkeypatch, capsys, "generate", prompt), "empty")


def test_broken_models(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, default_gguf: Path
) -> None:
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(default_gguf.read_bytes()[:5_000_000])
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text(json.dumps({"architectures": ["WhateverForCausalLM"]}))
    (unknown / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    for model, word in ((truncated, "truncated"), (empty, "weights"), (unknown, "WhateverForCausalLM")):
        assert_one_line_error(run(monkeypatch, capsys, "generate", "hello", "--model", str(model)), word)


@pytest.mark.real
def test_prompt_longer_than_the_context(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], default_gguf: Path
) -> None:
    flags = ["--model", str(default_gguf), "--max-model-len", "64"]
    assert_one_line_error(run(monkeypatch, capsys, "generate", "word " * 100, *flags), "max_model_len")


@pytest.mark.real
def test_context_beyond_the_model_is_refused_before_the_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], default_gguf: Path
) -> None:
    monkeypatch.setattr("llm_infer.loading.read_model", None)
    flags = ["--model", str(default_gguf), "--max-model-len", "100000"]
    assert_one_line_error(run(monkeypatch, capsys, "generate", "hello", *flags), "max_model_len=100000", "8192")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["llm-infer", "generate", "x", "--temperature", "-1", "--debug"])
    with pytest.raises(app.UserError):
        app.main()


@pytest.mark.real
def test_generate_streams_the_answer_to_stdout(default_gguf: Path) -> None:
    command = [sys.executable, "-m", "llm_infer.commands.app", "generate", "--raw", "The capital of France is"]
    command += ["--model", str(default_gguf), "--max-tokens", "5", "--max-model-len", "512"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.startswith(" Paris")


class _Answering:
    """In place of an `LLM`: these chunks answer every prompt."""

    def __init__(self, *chunks: StreamChunk) -> None:
        self.tokenizer = SimpleNamespace(encode=list, chat_template=None)
        self.chunks = chunks

    def stream(self, *_: object) -> Iterator[StreamChunk]:
        return iter(self.chunks)


def test_an_answer_that_could_not_go_on_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = _Answering(StreamChunk(0, "begun", [1], None), StreamChunk(0, "", [], "error", error="lower min_tokens"))
    monkeypatch.setattr(generate, "interactive_llm", lambda _: llm)
    assert run(monkeypatch, capsys, "generate", "hello") == (1, "begun\n", "error: lower min_tokens\n")


def test_log_probabilities_come_after_the_answer_as_a_table(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first = {5: Logprob(-0.25, 1, " Paris"), 9: Logprob(-1.5, 2, " not")}
    second = {7: Logprob(-12.125, 341, "\n"), 5: Logprob(-0.5, 1, "."), 9: Logprob(-1.0, 2, "!")}
    llm = _Answering(
        StreamChunk(0, " Paris", [5], None, logprobs=[first]), StreamChunk(0, "\n", [7], "stop", logprobs=[second])
    )
    monkeypatch.setattr(generate, "interactive_llm", lambda _: llm)
    monkeypatch.setattr(sys, "stderr", sys.stdout)  # as a terminal shows it
    code, out, _ = run(monkeypatch, capfd, "generate", "hello", "--logprobs", "2")
    assert code == 0 and out.splitlines() == [
        *(" Paris", ""),
        "token     logprob    rank  likely tokens",
        "' Paris'   -0.250       1  ' not' -1.500",
        "'\\n'      -12.125     341  '.' -0.500  '!' -1.000",
    ]


def test_an_answer_that_is_cut_by_the_default_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = _Answering(*(StreamChunk(0, "a", [1], "length" if i == 256 else None) for i in range(1, 257)))
    monkeypatch.setattr(generate, "interactive_llm", lambda _: llm)
    _, _, said = run(monkeypatch, capsys, "generate", "hello")
    assert said == "note: --max-tokens 256 is reached, so the answer is cut: raise --max-tokens (-n)\n"


def test_each_kind_of_structure_reaches_the_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("{}")
    asked = []
    llm = _Answering(StreamChunk(0, "a", [1], "stop"))
    monkeypatch.setattr(generate, "interactive_llm", lambda _: llm)
    monkeypatch.setattr(generate, "show_answer", lambda _, params, **__: asked.append(params.structured_outputs))
    file = str(tmp_path / "file")
    for flags in (["--json-schema", file], ["--regex", "a+"], ["--choice", "a", "--choice", "b"], ["--grammar", file]):
        assert run(monkeypatch, capsys, "generate", "hello", *flags)[0] == 0
    kinds = {"json": "{}", "regex": "a+", "choice": ("a", "b"), "grammar": "{}"}
    assert [(each.kind, getattr(each, each.kind)) for each in asked] == list(kinds.items())


@pytest.mark.parametrize(
    ("tokens", "reason", "said"),
    [
        (
            3,
            "length",
            "note: --max-tokens 3 is reached, so the answer is cut and may be incomplete JSON: raise --max-tok",
        ),
        (
            2,
            "length",
            "note: the context is full, so the answer is cut and may be incomplete JSON: give a shorter prompt",
        ),
        (3, "stop", ""),
    ],
)
def test_a_structured_answer_that_was_cut_says_so(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tokens: int,
    reason: str,
    said: str,
) -> None:
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    llm = _Answering(*(StreamChunk(0, "{", [1], reason if i == tokens else None) for i in range(1, tokens + 1)))
    monkeypatch.setattr(generate, "interactive_llm", lambda _: llm)
    for flags in ((), ("--json-schema", str(tmp_path / "schema.json"))):
        code, out, err = run(monkeypatch, capsys, "generate", "hello", "--max-tokens", "3", *flags)
        assert code == 0 and out == "{" * tokens + "\n"
        # A plain text that ends where its user said needs no note.
        expected = said if flags else said.replace(" and may be incomplete JSON", "") if "context" in said else ""
        assert err.startswith(expected) and err.count("\n") == bool(expected)


@pytest.mark.real
def test_ctrl_c_in_a_chat_stops_the_answer_and_not_the_program(default_gguf: Path) -> None:
    command = [sys.executable, "-u", "-m", "llm_infer.commands.app", "chat", "--model", str(default_gguf)]
    command += ["--max-model-len", "512", "--max-tokens", "200"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write(b"Write a very long story about a dragon.\n")
    process.stdin.flush()
    process.stdout.read(20)  # the answer has begun
    process.send_signal(signal.SIGINT)
    process.stdin.write(b"/restart\nMy name is Ada. What is my name?\n")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()
    assert b"(stopped)" in err and b"unknown command /restart" in err
    assert b"Traceback" not in err
    answers = out.decode().split("\n", 1)
    assert len(answers) == 2 and len(answers[1].strip()) > 10, "the second question got no answer"


@pytest.mark.parametrize("name", ["missing/figures.json", "."])
def test_figures_that_cannot_be_written_are_refused_before_they_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert_one_line_error(run(monkeypatch, capsys, "bench", "step", "--json", name), f"--json {name} cannot be written")


def test_doctor_tells_drivers_from_the_libraries_that_use_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "not installed" if name == "libtpu" else "1")
    for files, said in (((), "no GPU or TPU"), (("accel0",), f"{tmp_path}/accel0; not installed: libtpu (extra tpu)")):
        for file in files:
            (tmp_path / file).touch()
        monkeypatch.setattr(accelerators, "DEVICE_FILES", (f"{tmp_path}/accel*",))
        code, out, err = run(monkeypatch, capsys, "doctor")
        assert code == 0 and err == ""
        assert (
            next(line for line in out.splitlines() if line.startswith("drivers")).split(maxsplit=1)[1].startswith(said)
        )


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(monkeypatch, capsys, "--version")
    assert code == 0 and out.startswith("llm-infer ") and err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_an_output_that_cannot_be_written_is_one_line() -> None:
    code = "import sys; from llm_infer.commands.app import main, app; from llm_infer.commands.answers import write\n"
    code += "app.command('fill')(lambda: write('x' * 100)); sys.argv = ['llm-infer', 'fill']; main()"
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert result.returncode == 1
    assert result.stderr == "error: standard output cannot be written: No space left on device\n"


def test_ctrl_c_while_jax_is_imported_ends_the_program(tmp_path: Path) -> None:
    """What is imported in JAX's place, and then imports JAX, strikes in the middle, as a terminal would."""
    (tmp_path / "jax.py").write_text(
        "import os, signal, sys\n"
        "try: os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt: sys.stderr.write('struck within')\n"
        "sys.path.remove(os.path.dirname(__file__)); del sys.modules['jax']; import jax"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(app.__file__).parents[2])])}
    command = [sys.executable, "-m", "llm_infer.commands.app", "generate", "hi"]
    result = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (130, "error: interrupted\n")


def test_help_loads_neither_jax_nor_anything_else_that_takes_long() -> None:
    code = "import sys, llm_infer.commands.app; print({'jax', 'numpy', 'huggingface_hub', 'rich'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert result.stdout == "set()\n"


@pytest.mark.parametrize("device", [None, "nvidia0", "accel0"])
def test_libraries_for_devices_that_are_not_here_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, device: str | None
) -> None:
    """A CUDA plugin or libtpu that finds no device writes a screenful before the answer; with a device it may complain."""
    if device is not None:
        (tmp_path / device).touch()
    files = [pattern.replace("/dev", str(tmp_path)) for pattern in accelerators.DEVICE_FILES]
    monkeypatch.setattr(accelerators.none_is_here, "__defaults__", (files,))
    monkeypatch.setenv("JAX_PLATFORMS", "of the user")
    assert run(monkeypatch, capsys, "--help")[0] == 0
    assert os.environ["JAX_PLATFORMS"] == "of the user"
    monkeypatch.delenv("JAX_PLATFORMS")
    assert run(monkeypatch, capsys, "--help")[0] == 0
    assert os.environ.get("JAX_PLATFORMS") == ("cpu" if device is None else None)
    plugins = [EntryPoint("metal", "jax_plugins.metal", "jax_plugins")]
    monkeypatch.setattr(accelerators, "entry_points", lambda group: plugins)
    assert not accelerators.none_is_here(), "who knows where its device is"
