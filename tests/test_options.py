"""One list of settings under arguments, files, flags and documentation: all agree, and every mistake is named."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llm_infer
from llm_infer.base.errors import UserError
from llm_infer.base.settings import from_arguments
from llm_infer.commands import app, chat, generate
from llm_infer.config import EngineConfig
from llm_infer.llm import LLM
from llm_infer.options import EngineOptions, read_options, settings
from llm_infer.weights.default_model import DEFAULT_MODEL

SERVING = sorted((Path(__file__).parent.parent / "configs" / "serving").glob("*.toml"))


@pytest.mark.parametrize("path", SERVING, ids=lambda path: path.stem)
def test_committed_files_hold_settings(path: Path) -> None:
    assert EngineOptions(**read_options(path)).device in ("cpu", "gpu", "tpu")


def test_settings_for_a_device_are_refused_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_infer.starting.load", lambda *_, **__: pytest.fail("the model is not to be read"))
    for path in SERVING:
        device = {"cpu": "cpu", "h200": "gpu"}.get(path.stem, "tpu")
        assert read_options(path)["device"] == device
        if device != "cpu":
            with pytest.raises(UserError, match=rf"device='{device}': JAX found \d × cpu here .*set device to 'cpu'"):
                LLM(**read_options(path))
    with pytest.raises(UserError, match="expected one of auto, cpu, gpu, tpu"):
        LLM(device="cuda")


def test_every_setting_has_one_line_of_help() -> None:
    for setting in settings().values():
        assert len(setting.summary) <= 60, setting.summary
        assert setting.help.startswith(setting.summary.removesuffix("."))
    names = [name for each in settings().values() for name in (each.name, *each.aliases)]
    assert len(set(names)) == len(names)


def test_the_default_options_are_the_default_configuration() -> None:
    options = EngineOptions()
    assert options.engine_config() == EngineConfig() and options.model == DEFAULT_MODEL.name
    with pytest.raises(FrozenInstanceError):
        options.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("front", [LLM, llm_infer.follow, EngineOptions], ids=["LLM", "follow", "EngineOptions"])
def test_signature_and_documentation_show_every_setting(front: Callable[..., object]) -> None:
    shown = list(inspect.signature(front, eval_str=True).parameters.values())
    assert shown == list(inspect.signature(EngineOptions, eval_str=True).parameters.values())
    assert "max_model_len: int | None = None" in str(inspect.signature(front, eval_str=True))
    documentation = inspect.getdoc(front) or ""
    for setting in settings().values():
        assert f"\n    {setting.name}: {setting.summary.split()[0]}" in documentation


def test_settings_may_have_vllm_s_names() -> None:
    given = dict(block_size=32, gpu_memory_utilization=0.5, num_gpu_blocks_override=9, scheduling_policy="priority")
    options = from_arguments(EngineOptions, ("org/name",), {**given, "kv-cache-memory-bytes": 7})
    expected = dict(page_size=32, memory_utilization=0.5, num_pages=9, policy="priority", kv_cache_memory=7)
    assert options == EngineOptions("org/name", **expected)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(max_num_seq=4), "'max_num_seq' is no setting: did you mean max_num_seqs?"),
        (dict(colour=4), "'colour' is no setting: known are model, max_model_len"),
        (dict(page_size=16, block_size=16), "page_size is set twice, the second time as 'block_size'"),
        (dict(model=3), "model=3: expected a text or a path"),
        (dict(max_num_seqs="4"), "max_num_seqs='4': expected a whole number"),
        (dict(max_num_seqs=True), "max_num_seqs=True: expected a whole number"),
        (dict(max_num_seqs=4.0), "max_num_seqs=4.0: expected a whole number"),
        (dict(memory_utilization="all"), "memory_utilization='all': expected a number"),
        (dict(memory_utilization=2), "memory_utilization=2: expected a share above 0 and up to 1"),
        (dict(overlap="no"), "overlap='no': expected True or False"),
        (dict(progress=1), "progress=1: expected True or False"),
        (dict(dtype="float64"), "dtype='float64': expected one of auto, float32, bfloat16, float16"),
        (dict(precision="quick"), "precision='quick': expected one of exact, fast"),
        (dict(load_format="none"), "load_format='none': expected one of auto, dummy"),
        (dict(speculative_config="ngram"), "speculative_config='ngram': expected a mapping"),
        (dict(speculative_config={"methods": "ngram"}), r"speculative_config has unknown keys \['methods'\]"),
        (dict(coordinator_address=3), "coordinator_address=3: expected a text"),
        (dict(max_num_seqs=64, max_num_batched_tokens=8), "max_num_batched_tokens=8 is smaller than max_num_seqs=64"),
    ],
)
def test_a_mistake_in_an_argument_is_named_before_anything_is_loaded(
    arguments: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_infer.llm.start", lambda _: pytest.fail("nothing is to be started"))
    with pytest.raises(UserError, match=f"^{said}"):
        LLM(**arguments)


def test_only_the_model_has_no_name() -> None:
    with pytest.raises(UserError, match="only model can be given without a name: 512 needs one"):
        LLM("org/name", 512)  # type: ignore[misc]
    with pytest.raises(UserError, match="model is set twice"):
        LLM("org/name", model="org/name")  # type: ignore[misc]


def test_values_may_be_numpy_s() -> None:
    options = EngineOptions(max_num_seqs=np.int32(4), memory_utilization=np.float32(0.5), overlap=np.bool_(False))
    assert repr(options) == repr(EngineOptions(max_num_seqs=4, memory_utilization=0.5, overlap=False))


def test_hosts_compare_what_must_be_the_same() -> None:
    own = dict(coordinator_address="10.0.0.1:8476", num_processes=2, process_id=1, progress=False)
    shared = EngineOptions(**own).of_all_processes()
    assert shared == EngineOptions().of_all_processes() and not shared.keys() & own.keys()
    assert shared.keys() | own.keys() == settings().keys()
    assert replace(EngineOptions(), seed=1).of_all_processes()["seed"] == "1"


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[EngineOptions]:
    """The options with which a command would make its LLM."""
    found: list[EngineOptions] = []

    def enough(options: EngineOptions) -> None:
        found.append(options)
        raise UserError("enough")

    for module in (generate, chat):
        monkeypatch.setattr(module, "interactive_llm", enough)
    monkeypatch.setattr("llm_infer.bench.offline.LLM.of", enough)
    return found


def run(monkeypatch: pytest.MonkeyPatch, *command: str) -> None:
    monkeypatch.setattr(sys, "argv", ["llm-infer", *command])
    with pytest.raises(SystemExit):
        app.main()


COMMANDS = pytest.mark.parametrize(
    "command", [["generate", "Hi"], ["chat"], ["bench", "offline"]], ids=lambda command: command[-1]
)


@COMMANDS
def test_a_typed_flag_goes_before_the_file_even_at_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], reached: list[EngineOptions]
) -> None:
    file = tmp_path / "x.toml"
    file.write_text('precision = "fast"\ndtype = "float32"\ndevice = "cpu"\n')
    run(monkeypatch, *command, "--config", str(file), "--precision", "exact", "--dtype", "auto")
    assert [(each.precision, each.dtype, each.device) for each in reached] == [("exact", "auto", "cpu")]
    run(monkeypatch, *command, "--config", str(file))
    assert [(each.precision, each.dtype, each.device) for each in reached[1:]] == [("fast", "float32", "cpu")]


def test_a_file_goes_before_the_defaults_of_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reached: list[EngineOptions]
) -> None:
    file = tmp_path / "x.toml"
    file.write_text("max-num-seqs = 4\nblock-size = 32\n")
    for flags in ([], ["--config", str(file)], ["--config", str(file), "--max-num-seqs", "1"]):
        run(monkeypatch, "generate", "Hi", *flags)
    assert [(each.max_num_seqs, each.page_size) for each in reached] == [(1, 16), (4, 32), (1, 32)]


def test_every_setting_is_a_flag(monkeypatch: pytest.MonkeyPatch, reached: list[EngineOptions]) -> None:
    """But for the engine's seed, as `--seed` is the answer's, and for `progress`."""
    values: dict[str, Any] = {"speculative_config": {"method": "ngram"}, "model": os.getcwd(), "num_pages": 99}
    values |= {"memory_utilization": 0.5, "coordinator_address": "10.0.0.1:8476", "max_model_len": 64}
    flags = []
    for setting in settings().values():
        if setting.name in ("seed", "progress"):
            continue
        if isinstance(setting.default, bool):
            values[setting.name] = not setting.default
        elif setting.choices:
            values[setting.name] = setting.choices[1]
        values.setdefault(setting.name, setting.default or 8)
        name, value = setting.name.replace("_", "-"), values[setting.name]
        shown = str(value).replace("'", '"')
        flags += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", shown]
    run(monkeypatch, "chat", *flags)
    assert reached == [EngineOptions(**values)]


def test_flags_have_vllm_s_and_short_names(monkeypatch: pytest.MonkeyPatch, reached: list[EngineOptions]) -> None:
    run(
        monkeypatch,
        "chat",
        "-tp",
        "2",
        "-dp",
        "3",
        "-m",
        "org/name",
        "--block-size",
        "8",
        "--gpu-memory-utilization",
        "1",
    )
    expected = dict(tensor_parallel_size=2, data_parallel_size=3, page_size=8, memory_utilization=1.0)
    assert reached == [EngineOptions("org/name", max_num_seqs=1, **expected)]  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["ngram", "3", "{"])
def test_a_flag_that_is_no_json_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    run(monkeypatch, "chat", "--speculative-config", text)
    assert "--speculative-config" in (said := capsys.readouterr().err) and "expected JSON such as" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max-num-seq = 4", "did you mean max-num-seqs?"),
        ("colour = 1", "known are model, max_model_len"),
        ("block-size = 16\npage-size = 16", "page_size is set twice"),
        ("max-num-seqs = 'x'", "max_num_seqs='x': expected a whole number"),
        ("precision = 'quick'", "precision='quick': expected one of exact, fast"),
        ("model = ", "Invalid value"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "x.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"--config .*x\.toml") as caught:
        read_options(file)
    assert said in str(caught.value)
    with pytest.raises(UserError, match="No such file"):
        read_options(tmp_path / "missing.toml")
