"""Engine arguments from files: every committed one is accepted, every mistake is named."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from llm_infer.base.errors import UserError
from llm_infer.commands import app, bench, chat, generate
from llm_infer.commands.options import engine_arguments
from llm_infer.engine_arguments import VLLM_NAMES, argument_names, read_engine_arguments
from llm_infer.llm import LLM

SERVING = sorted((Path(__file__).parent.parent / "configs" / "serving").glob("*.toml"))


@pytest.mark.parametrize("path", SERVING, ids=lambda path: path.stem)
def test_committed_files_hold_arguments(path: Path) -> None:
    assert set(read_engine_arguments(path)) <= set(argument_names())


def test_settings_for_a_device_are_refused_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_infer.llm.load", lambda *_, **__: pytest.fail("the model is not to be read"))
    for path in SERVING:
        device = {"cpu": "cpu", "h200": "gpu"}.get(path.stem, "tpu")
        assert read_engine_arguments(path)["device"] == device
        if device != "cpu":
            with pytest.raises(UserError, match=rf"device='{device}': JAX found \d × cpu here .*set device to 'cpu'"):
                LLM(**read_engine_arguments(path))
    with pytest.raises(UserError, match="expected one of auto, cpu, gpu, tpu"):
        LLM(device="cuda")
    assert engine_arguments(str(SERVING[-1]), device="cpu")["device"] == "cpu"


def test_flags_go_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text('max-num-seqs = 4\nblock-size = 32\nprecision = "fast"\ndtype = "float32"\n')
    found = engine_arguments(str(file), dtype="bfloat16", max_model_len=None)
    assert found == {"max_num_seqs": 4, "page_size": 32, "precision": "fast", "dtype": "bfloat16"}


@pytest.mark.parametrize("command", [["generate", "Hi"], ["chat"], ["bench", "offline"]], ids=lambda c: c[-1])
def test_a_typed_flag_goes_before_the_file_even_at_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    file = tmp_path / "x.toml"
    file.write_text('precision = "fast"\ndtype = "float32"\ndevice = "cpu"\n')
    found: list[dict] = []

    def taken(config: str, *args: Any, **flags: Any) -> dict:
        found.append(engine_arguments(config, *args, **flags))
        raise UserError("enough")

    for module in (generate, chat, bench):
        monkeypatch.setattr(module, "engine_arguments", taken)
    monkeypatch.setattr(
        sys, "argv", ["llm-infer", *command, "--config", str(file), "--precision", "exact", "--dtype", "auto"]
    )
    with pytest.raises(SystemExit):
        app.main()
    assert found == [{"precision": "exact", "dtype": "auto", "device": "cpu"}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max-num-seq = 4", "did you mean max-num-seqs?"),
        ("colour = 1", "known are max_model_len"),
        ("block-size = 16\npage-size = 16", "page_size is set twice"),
        ("model = ", "Invalid value"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "x.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"--config .*x\.toml") as caught:
        read_engine_arguments(file)
    assert said in str(caught.value)
    with pytest.raises(UserError, match="No such file"):
        read_engine_arguments(tmp_path / "missing.toml")


def test_names_of_vllm_lead_to_arguments() -> None:
    assert set(VLLM_NAMES.values()) <= set(argument_names())
