"""Models of the Hugging Face hub, which a local server plays."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llm_infer.base.errors import ModelError
from llm_infer.models.opened import open_model
from llm_infer.weights import hub
from llm_infer.weights.gguf_choice import choose, gguf_models, labels
from llm_infer.weights.model_names import HubName, hub_name
from llm_infer.weights.sources import ModelSource
from tests.weights.local_hub import Hub, environment, serving
from tests.weights.tiny_models import CONFIG


def _resolve_in_subprocess(names: list[str], endpoint: str, home: Path, **more: str) -> list[str]:
    """For each name its path or the error's message. Each must be there within 10 s."""
    script = (
        "import json, sys, time\n"
        "from llm_infer.base.errors import ModelError\n"
        "from llm_infer.weights.sources import resolve\n"
        "import huggingface_hub\n"
        "results = []\n"
        "for name in sys.argv[1:]:\n"
        "    started = time.perf_counter()\n"
        "    try: results.append(str(resolve(name).path))\n"
        "    except ModelError as error: results.append(f'ModelError: {error}')\n"
        "    assert time.perf_counter() - started < 10\n"
        "print(json.dumps(results))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *names],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment(endpoint, home, **more),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_hub(tmp_path: Path) -> None:
    save_file({"w": np.ones((2, 2), np.float32)}, tmp_path / "w.safetensors")
    weights = (tmp_path / "w.safetensors").read_bytes()
    good = {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors": weights,
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "README.md": b"not needed",
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": weights,
        "onnx/model.onnx": b"other format",
        "onnx/config.json": b"{}",
    }
    server = Hub({"org/good": good, "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"x"}})
    server.repositories["org/quantised"] = {"m-q4_0.gguf": b"x" * 4, "m-q8_0.gguf": b"x" * 8}
    home = tmp_path / "home"
    with serving(server):
        endpoint = server.endpoint
        names = ["org/good", "org/quantised:Q8_0", "org/pickled", "org/quantised", "org/absent", "org/good@v9"]
        path, quantised, *errors = _resolve_in_subprocess(names, endpoint, home)
    assert Path(quantised).name == server.served.pop() == "m-q8_0.gguf"
    fetched = sorted(p.name for p in Path(path).iterdir())
    assert fetched == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(server.served) == fetched
    assert list(open_model(ModelSource("org/good", "huggingface", Path(path))).tensors.names) == ["w"]
    for error, message in zip(
        errors,
        [
            "ModelError: .*no safetensors weights.*never loaded",
            r"ModelError: .*holds several types: name one, as in org/quantised:Q4_0; there are Q4_0 \(4 B\), Q8_0 \(8 B\)",
            "ModelError: no local path 'org/absent' and no such model on the Hugging Face hub",
            "ModelError: hub model 'org/good' has no revision 'v9'",
        ],
        strict=True,
    ):
        assert re.match(message, error), error

    # The server is gone: what was fetched is still there, anything else is one clear error.
    names = ["org/good", "org/other", "org/quantised", "org/quantised:Q4_0"]
    good, other, only, missing = _resolve_in_subprocess(names, endpoint, home)
    assert good == path and only == quantised  # of the types that are here the only one
    assert "has no GGUF file of type 'Q4_0': there are Q8_0 (8 B); the Hugging Face hub cannot be reached" in missing
    assert other.startswith("ModelError: no local path 'org/other', the Hugging Face hub cannot be reached (")
    assert "local GGUF file or Hugging Face directory" in other and "\n" not in other
    good, other = _resolve_in_subprocess(["org/good", "org/other"], endpoint, home, HF_HUB_OFFLINE="1")
    assert good == path
    assert "HF_HUB_OFFLINE=1 forbids network use" in other


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("org/name", HubName("org/name")),
        ("org/name:Q4_K_M", HubName("org/name", None, "Q4_K_M")),
        ("org/name@v1.0:UD-Q4_K_XL", HubName("org/name", "v1.0", "UD-Q4_K_XL")),
        ("org/name@refs/pr/1", HubName("org/name", "refs/pr/1")),
        ("models/a.gguf", None),
        ("name:Q4_0", None),
        ("org/name:", None),
        ("a/b/c", None),
        ("org/name@../../other", None),
    ],
)
def test_names_on_the_hub(name: str, meant: HubName | None) -> None:
    assert hub_name(name) == meant
    assert meant is None or str(meant) == name


def test_gguf_files_are_known_by_type() -> None:
    names = {
        "Model-8B-Q4_K_M.gguf": "Q4_K_M",
        "model.q8_0.gguf": "Q8_0",
        "sub/Big-IQ3_XXS-00001-of-00002.gguf": "IQ3_XXS",
        "Big-UD-Q4_K_XL.gguf": "UD-Q4_K_XL",
        "Q8-tuned-f16.gguf": "F16",
        "gpt-oss-20b-mxfp4.gguf": "MXFP4",
        "ggml-model-i2_s.gguf": "ggml-model-i2_s",
    }
    for name, quantisation in names.items():
        assert [model.quantisation for model in gguf_models({name: 1})] == [quantisation]
    assert (
        gguf_models({"mmproj-Model-f16.gguf": 1, "imatrix.gguf": 1, "Model.imatrix.gguf": 1, "a.safetensors": 1}) == []
    )


def test_which_gguf_file_is_meant() -> None:
    parts = {f"a-Q6_K-0000{i}-of-00003.gguf": 10 for i in (2, 1, 3)}
    models = gguf_models({"a-Q4_K_M.gguf": 5, "a-Q2_K.gguf": 2, "b-Q2_K.gguf": 3, **parts})
    assert labels(models) == ["a-Q2_K", "b-Q2_K", "Q4_K_M", "Q6_K"]
    assert choose(models, None, "o/n").files == ("a-Q4_K_M.gguf",)  # as llama.cpp
    assert choose(models, "q6_k", "o/n").files == tuple(f"a-Q6_K-0000{i}-of-00003.gguf" for i in (1, 2, 3))
    assert choose(models, "b-q2_k.gguf", "o/n").files == ("b-Q2_K.gguf",)
    assert choose(models[:1], None, "o/n").files == ("a-Q2_K.gguf",)
    with pytest.raises(ModelError, match="several files of type Q2_K: give one of o/n:a-Q2_K, o/n:b-Q2_K"):
        choose(models, "Q2_K", "o/n")
    with pytest.raises(ModelError, match=r"no GGUF file of type 'Q9': there are a-Q2_K \(2 B\), .*, Q6_K \(30 B\)"):
        choose(models, "Q9", "o/n")
    with pytest.raises(ModelError, match="several types: name one, as in o/n:a-Q2_K"):
        choose(models[:2], None, "o/n")
    del parts["a-Q6_K-00002-of-00003.gguf"]
    with pytest.raises(ModelError, match="Q6_K lacks 1 of 3 parts: run `llm-infer pull o/n:Q6_K`"):
        choose(gguf_models(parts | {"a-Q2_K.gguf": 2}), "Q6_K", "o/n")


def test_a_model_that_does_not_fit_on_the_disk_is_refused_before_it_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"org/name:Q8_0 needs 1000000.0 TB, and .* has room for .*: remove models with"
    ):
        hub._require_room(HubName("org/name", None, "Q8_0"), tmp_path / "models--org--name", 10**18)
