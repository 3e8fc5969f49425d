"""Flags of `generate` and `chat`: one table over the sampling parameters, prompts from everywhere, defaults of the user."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_infer.base.errors import UserError
from llm_infer.base.outputs import CompletionOutput, StreamChunk
from llm_infer.commands import app, chat, doctor, generate
from llm_infer.commands.sampling import FIELDS, FLAGS, NO_FLAGS, sampling_params
from llm_infer.commands.user_file import user_file
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.options import EngineOptions


class Recorder:
    """In place of an `LLM`: keeps what it is asked, and answers "yes"."""

    def __init__(self, template: str | None = "t") -> None:
        self.tokenizer = SimpleNamespace(encode=lambda text: f"raw {text}", chat_template=template)
        self.prompts: list[Any] = []
        self.params: list[SamplingParams] = []
        self.engines: list[EngineOptions] = []

    def chat_prompt(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        return [dict(message) for message in messages]

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[StreamChunk]:
        self.prompts.append(prompt)
        self.params.append(params)
        yield StreamChunk(0, "yes", [1], "stop")

    def generate(self, prompt: Any, params: SamplingParams) -> list[Any]:
        self.params.append(params)
        return [SimpleNamespace(outputs=[CompletionOutput(0, "best", [1, 2], "stop"), CompletionOutput(1, "worse")])]


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()

    def made(options: EngineOptions) -> Recorder:
        found.engines.append(options)
        return found

    for module in (generate, chat):
        monkeypatch.setattr(module, "interactive_llm", made)
    return found


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["llm-infer", *args])
    with pytest.raises(SystemExit) as stop:
        app.main()
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err  # type: ignore[return-value]


def test_every_sampling_parameter_is_a_flag_or_says_why_not() -> None:
    table = {flag.name for flag in FIELDS}
    assert table | set(NO_FLAGS) == {field.name for field in fields(SamplingParams)}
    assert not table & set(NO_FLAGS)


def test_flags_reach_the_request_in_both_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], llm: Recorder
) -> None:
    flags = "-n 9 --temperature 0.5 --top-k 7 --top-p 0.9 --min-p 0.1 --typical-p 0.8 --repetition-penalty 1.1 "
    flags += "--presence-penalty 0.2 --frequency-penalty 0.3 -s 4 --stop a --stop b --stop-token-ids 3 --bad-words c "
    flags += "--min-tokens 2 --ignore-eos --logprobs 1 --json-object"
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n/exit\n"))
    assert run(monkeypatch, capsys, "generate", "Hi", *flags.split())[:2] == (0, "yes\n")
    assert run(monkeypatch, capsys, "chat", *flags.split())[:2] == (0, "yes\n")
    one, other = llm.params
    assert one == other and one.structured_outputs is not None and one.structured_outputs.json_object
    values = {"max_tokens": 9, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8, "seed": 4}
    values |= {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3, "stop": ("a", "b")}
    values |= {"stop_token_ids": (3,), "bad_words": ("c",), "min_tokens": 2, "ignore_eos": True, "logprobs": 1}
    assert {name: getattr(one, name) for name in values} == values
    assert llm.prompts == [[{"role": "user", "content": "Hi"}]] * 2


def test_defaults_and_values_of_llama_cpp(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], llm: Recorder
) -> None:
    run(monkeypatch, capsys, "generate", "Hi")
    run(monkeypatch, capsys, "generate", "-p", "Hi", "-n", "-1", "-s", "-1", "-t", "3", "-m", "org/name:Q4_0")
    assert llm.params == [
        SamplingParams(temperature=0.0, max_tokens=256),
        SamplingParams(temperature=0.0, max_tokens=None),
    ]
    assert llm.engines[-1] == EngineOptions("org/name:Q4_0", max_num_seqs=1)
    assert os.environ.pop("LLM_INFER_NUM_THREADS") == "3"


def test_a_beam_search_shows_the_best_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], llm: Recorder
) -> None:
    code, out, err = run(
        monkeypatch, capsys, "generate", "Hi", "--beam-width", "2", "--length-penalty", "0.5", "--early-stopping", "-v"
    )
    assert (code, out) == (0, "best\n") and err.startswith("2 tokens in 0.")
    assert llm.engines[0].max_num_seqs == 2
    assert (llm.params[0].beam_width, llm.params[0].length_penalty, llm.params[0].early_stopping) == (2, 0.5, True)


def test_quiet_shows_no_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], llm: Recorder
) -> None:
    for flags, shown in (([], True), (["-q"], False)):
        assert run(monkeypatch, capsys, "generate", "Hi", *flags)[0] == 0
        assert llm.engines[-1].progress == shown


def test_prompts_from_everywhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], llm: Recorder, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("two\nlines\n")
    saved = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    (tmp_path / "c.json").write_text(json.dumps(saved))
    (tmp_path / "bad.json").write_text('{"role": "user"}')
    (tmp_path / "answered.json").write_text(json.dumps(saved[:2]))
    names = ("p.txt", "c.json", "bad.json", "answered.json")
    text, conversation, bad, answered = (str(tmp_path / name) for name in names)
    system = {"role": "system", "content": "S"}
    for flags, prompt in (
        (["-f", text], [{"role": "user", "content": "two\nlines"}]),
        (["--prompt-file", text, "--raw"], "raw two\nlines"),
        (["-f", conversation, "d"], [*saved, {"role": "user", "content": "d"}]),
        (["--prompt", "x", "--system", "S"], [system, {"role": "user", "content": "x"}]),
        (["-f", conversation, "--system", "S"], [system, *saved]),
    ):
        assert run(monkeypatch, capsys, "generate", *flags)[0] == 0
        assert llm.prompts[-1] == prompt
    for flags, words in (
        ([], "give a prompt, as in"),
        (["a", "-p", "b"], "give one prompt only"),
        (["-f", "missing.txt"], "--prompt-file missing.txt: No such file"),
        (["-f", answered], "ends with an answer: give the next question, too"),
        (["-f", text, "a"], "give one prompt only"),
        (["-f", bad], "expected a list of messages"),
        (["-p", " "], "the prompt is empty"),
        (["a", "--raw", "--system", "S"], "--system needs a chat template, and --raw leaves it out"),
    ):
        code, out, err = run(monkeypatch, capsys, "generate", *flags)
        assert (code, out) == (1, "") and words in err and err.count("\n") == 1


# The user's file


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's file, where the standard says."""
    monkeypatch.delenv("LLM_INFER_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    path = tmp_path / "xdg" / "llm_infer" / "config.toml"
    path.parent.mkdir(parents=True)
    return path


def test_flags_go_before_the_users_file_and_that_before_defaults(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], llm: Recorder, file: Path
) -> None:
    file.write_text(
        'model = "org/name:Q4_0"\ntemperature = 1\nmax-tokens = 7\nstop = "x"\nconfig = "engine.toml"\n'
        "max-num-seqs = 2\nblock-size = 32\nmax-model-len = 16\n"
        '[chat]\nmax_tokens = 8\nsystem = "S"\n'
    )
    (file.parent / "engine.toml").write_text('precision = "fast"\nmax-model-len = 64\n')
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n/exit\n"))
    assert run(monkeypatch, capsys, "generate", "Hi", "--temperature", "0", "--max-model-len", "32")[0] == 0
    assert run(monkeypatch, capsys, "chat")[0] == 0
    assert llm.params == [
        SamplingParams(temperature=0.0, max_tokens=7, stop=("x",)),
        SamplingParams(temperature=1.0, max_tokens=8, stop=("x",)),
    ]
    engine = EngineOptions("org/name:Q4_0", max_num_seqs=2, precision="fast", page_size=32)
    assert llm.engines == [replace(engine, max_model_len=32), replace(engine, max_model_len=64)]
    assert llm.prompts[-1][0] == {"role": "system", "content": "S"}
    other = file.parent / "other.toml"
    other.write_text('model = "org/other"\nblock-size = 8\n')
    run(monkeypatch, capsys, "generate", "Hi", "--config", str(other))
    assert llm.engines[-1] == EngineOptions("org/other", max_num_seqs=2, page_size=8, max_model_len=16)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("temprature = 1", "'temprature' is no flag of generate and chat: did you mean temperature?"),
        ("page-sise = 32", "'page-sise' is no setting: did you mean page-size?"),
        ("page-size = 'x'", "page_size='x': expected a whole number"),
        ("top-p = 'x'", "top-p = 'x': expected a number"),
        ("ignore-eos = 1", "ignore-eos = 1: expected true or false"),
        ("stop = [1]", "stop = [1]: expected a text"),
        ("chat = 1", "expected a table [chat]"),
        ("[chat]\nraw = true", "raw is a flag of generate alone"),
        ("model = ", "Invalid value"),
    ],
)
def test_mistakes_in_the_users_file_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: Path, text: str, said: str
) -> None:
    file.write_text(text)
    code, out, err = run(monkeypatch, capsys, "generate", "Hi")
    assert (code, out) == (1, "") and err.startswith(f"error: {file}: ") and said in err and err.count("\n") == 1


def test_the_users_file_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: Path) -> None:
    assert user_file() is None and doctor._user_file() == f"none (would be in {file})"
    file.touch()
    assert user_file() == file and doctor._user_file() == str(file)
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".config").symlink_to(tmp_path / "xdg")
    assert user_file() == tmp_path / ".config" / "llm_infer" / "config.toml"
    monkeypatch.setenv("LLM_INFER_CONFIG", "")
    assert user_file() is None and "is empty" in doctor._user_file()
    monkeypatch.setenv("LLM_INFER_CONFIG", str(tmp_path / "absent"))
    with pytest.raises(app.UserError, match=r"LLM_INFER_CONFIG=.*absent: there is no such file"):
        user_file()


def test_names_of_flags_do_not_meet() -> None:
    shorts = [flag.short for flag in FLAGS if flag.short]
    assert len(set(shorts)) == len(shorts) and not {"-m", "-p", "-f", "-t", "-v", "-q"} & set(shorts)


def test_the_whole_vocabulary_is_not_printed() -> None:
    values = dict.fromkeys((flag.name for flag in FLAGS), None) | {"logprobs": -1}
    with pytest.raises(UserError, match=r"--logprobs -1: expected 0 or more"):
        sampling_params(values)


def test_other_engines_names_and_underscores_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(generate, "interactive_llm", lambda options: recorder.engines.append(options) or recorder)
    flags = ["--max_tokens", "4", "--temp", "0.5", "--repeat-penalty", "1.2", "-c", "64"]
    monkeypatch.setattr(sys, "argv", ["llm-infer", "generate", "hello", *flags])
    with pytest.raises(SystemExit) as ended:
        app.main()
    (params,), (options,) = recorder.params, recorder.engines
    assert not ended.value.code and options.max_model_len == 64
    assert (params.max_tokens, params.temperature, params.repetition_penalty) == (4, 0.5, 1.2)


@pytest.mark.parametrize("text", ["x = = 3", "temprature = 1"])
def test_a_mistake_in_the_user_s_file_does_not_keep_doctor_from_naming_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "config.toml").write_text(text)
    monkeypatch.setenv("LLM_INFER_CONFIG", str(tmp_path / "config.toml"))
    for command, status in ((["doctor"], 0), (["generate", "--help"], 0), (["generate", "hello"], 1)):
        monkeypatch.setattr(sys, "argv", ["llm-infer", *command])
        with pytest.raises(SystemExit) as ended:
            app.main()
        said = capsys.readouterr()
        assert (ended.value.code or 0) == status, command
        assert (str(tmp_path / "config.toml") in said.out + said.err) == (command[-1] != "--help")
