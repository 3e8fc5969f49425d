"""Models whose tensors lie in another way in some repositories: text models beside towers, and experts in blocks of MXFP4."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_infer.base.progress import Progress
from llm_infer.models.load import compute_dtype, load_model
from llm_infer.models.opened import open_model
from llm_infer.quant import StoredWeights
from llm_infer.weights.sources import read_json, resolve
from tests.models.family_checkpoints import FOLDER, dense, golden, load

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1, OCP microscaling formats, table 5; the fourth bit is the sign
PREFIXES = {
    "as published": ("language_model.model.", "language_model.lm_head."),
    "by transformers 5": ("model.language_model.", "lm_head."),
}


@pytest.mark.parametrize("prefixes", PREFIXES.values(), ids=PREFIXES.keys())
@pytest.mark.parametrize(
    ("name", "outer_class"),
    [
        ("gemma3_gqa", "Gemma3ForConditionalGeneration"),
        ("mistral_gqa", "Mistral3ForConditionalGeneration"),
        ("ministral3_gqa", "Mistral3ForConditionalGeneration"),
    ],
)
def test_the_text_model_of_a_repository_with_towers(
    tmp_path: Path, name: str, outer_class: str, prefixes: tuple[str, str]
) -> None:
    directory = Path(shutil.copytree(FOLDER / name, tmp_path / "model"))
    config = read_json(directory / "config.json")
    del config["architectures"]
    outer = {"architectures": [outer_class], "text_config": config, "vision_config": {"depth": 3}}
    (directory / "config.json").write_text(json.dumps(outer | {"boi_token_index": 5}))
    tensors = {
        tensor.replace("model.", prefixes[0], 1): values
        for tensor, values in load_file(directory / "model.safetensors").items()
    }
    tensors |= {"vision_tower.layers.0.weight": np.zeros((2, 2), np.float32)}
    save_file(tensors, directory / "model.safetensors")
    shown = StringIO()
    model = load_model(open_model(resolve(str(directory))), progress=Progress(stream=shown))
    assert "its text model is loaded" in shown.getvalue()
    plain = load(name)
    assert model.config == plain.config and model.params.keys() == plain.params.keys()
    for param, values in plain.params.items():
        np.testing.assert_array_equal(model.params[param], values, err_msg=param)


def blocks_of_fp4(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random bytes and scales of weights [X, out, in], and the weights, one by one."""
    experts, rows, columns = shape
    blocks = rng.integers(0, 256, (experts, rows, columns // 32, 16), dtype=np.uint8)
    scales = rng.integers(122, 126, blocks.shape[:3], dtype=np.uint8)
    values = np.empty(shape, np.float32)
    for index in np.ndindex(shape):
        x, row, column = index
        block, place = divmod(column, 32)
        code = int(blocks[x, row, block, place // 2]) >> 4 * (place % 2) & 15
        sign = -1.0 if code & 8 else 1.0
        values[index] = sign * FP4[code & 7] * 2.0 ** (int(scales[x, row, block]) - 127)
    return blocks, scales, values


def test_experts_in_blocks_of_mxfp4(tmp_path: Path) -> None:
    """The same model twice: its experts in blocks, as gpt-oss is published, and as the numbers that the blocks stand for."""
    rng, name = np.random.default_rng(0), "gpt_oss_gqa"
    tensors = load_file(FOLDER / name / "model.safetensors")
    packed, plain = dict(tensors), dict(tensors)
    for key, values in tensors.items():
        if key.endswith(("gate_up_proj", "down_proj")) and ".experts." in key:
            experts, columns, rows = values.shape
            blocks, scales, numbers = blocks_of_fp4((experts, rows, columns), rng)
            plain[key] = np.ascontiguousarray(numbers.swapaxes(1, 2)).astype(ml_dtypes.bfloat16)
            del packed[key]
            packed |= {key + "_blocks": blocks, key + "_scales": scales}
    found = {}
    config = read_json(FOLDER / name / "config.json")
    for kind, contents in (("packed", packed), ("plain", plain)):
        directory = tmp_path / kind
        directory.mkdir()
        more = {"quantization_config": {"quant_method": "mxfp4"}} if kind == "packed" else {}
        (directory / "config.json").write_text(json.dumps(config | more))
        save_file(contents, directory / "model.safetensors")
        found[kind] = open_model(resolve(str(directory)))
    read, expected = load_model(found["packed"]), load_model(found["plain"])
    assert read.config == expected.config
    for key, values in expected.params.items():
        np.testing.assert_array_equal(read.params[key], values, err_msg=key)
    if compute_dtype("auto", "exact")[1] is not None:
        stored = load_model(found["packed"], stored="exact")
        up = stored.params["layers.mlp.up.weight"]
        assert isinstance(up, StoredWeights) and up.kinds == ("mxfp4",)
        prompt = golden(name).prompts[0]
        np.testing.assert_allclose(dense(stored, prompt)[0], dense(expected, prompt)[0], atol=1e-4)
