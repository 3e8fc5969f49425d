"""A damaged model file loads or is refused with one line: no traceback, no hang, no memory beyond a bound."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType
from safetensors.numpy import save_file

from llm_infer.base.errors import ModelError
from llm_infer.models.load import load_model
from llm_infer.models.opened import open_model
from llm_infer.weights.sources import resolve
from tests.weights.tiny_models import CONFIG, hf_tensors, write_gguf

ROOT = Path(__file__).parents[2]
KINDS = ("gguf", "safetensors", "json", "orbax")


def _run(kind: str, count: int, timeout: float) -> None:
    command = [sys.executable, "-m", "tests.weights.damaged_child", kind, str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    *faults, last = done.stdout.splitlines() or [""]
    assert done.returncode == 0 and not faults, f"{done.stdout[-4000:]}\n{done.stderr[-3000:]}"
    counts = json.loads(last)
    print(kind, counts)
    assert counts["loaded"] + counts["refused"] == count and counts["refused"] > count // 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_faults(kind: str) -> None:
    _run(kind, 100, 300)


@pytest.mark.sweep
@pytest.mark.parametrize("kind", KINDS)
def test_two_thousand_faults(kind: str) -> None:
    _run(kind, 2000, 3000)


def test_names_from_a_file_stay_on_one_line(tmp_path: Path) -> None:
    extra = {"llama.attention\n.odd": (1, GGUFValueType.UINT32)}
    path = write_gguf(tmp_path / "odd.gguf", hf_tensors(), extra=extra)
    with pytest.raises(ModelError, match=r"not understood.*llama\.attention\\n\.odd") as caught:
        open_model(resolve(str(path)))
    assert "\n" not in str(caught.value)
    for name in ("x" * 9999, "a\nb", "é" * 9999):
        save_file({name: np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 1}))
        with pytest.raises(ModelError, match="surplus") as caught:
            load_model(open_model(resolve(str(tmp_path))))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 900
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | {name: 1}))
        with pytest.raises(ModelError) as caught:
            load_model(open_model(resolve(str(tmp_path))))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
