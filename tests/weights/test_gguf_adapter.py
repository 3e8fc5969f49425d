"""GGUF models under Hugging Face names: values, row order, config, rope scaling, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize, quantize

from llm_infer.base.errors import ModelError
from llm_infer.models.opened import gguf_model
from llm_infer.weights.gguf import GGUFFile
from tests.weights.tiny_models import CONFIG, D, hf_tensors, write_gguf


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_1", "Q8_0"])
def test_tensors_come_back_under_their_hugging_face_names(tmp_path: Path, kind: str) -> None:
    type_ = GGMLQuantizationType[kind]
    tensors = hf_tensors(tied=False)
    types = {name: type_ for name in tensors if "norm" not in name}
    source = gguf_model(GGUFFile(write_gguf(tmp_path / "a.gguf", tensors, types)))[1]
    assert set(source.names) == set(tensors)
    for name, values in tensors.items():
        assert source.shape(name) == values.shape
        out = np.empty(values.shape, np.float32)
        source.read_into(name, out)
        # Quantisation is by row, so it commutes with the reordering of rows.
        expected = dequantize(quantize(values, types[name]), types[name]) if name in types else values
        np.testing.assert_array_equal(out, expected, err_msg=name)
        order = source.row_order(name)
        assert (order is not None) == name.endswith(("q_proj.weight", "k_proj.weight"))
        if order is not None and name in types:  # blocks can be gathered without decoding
            np.testing.assert_array_equal(source.tensor(name).blocks[order], quantize(values, type_).view(np.uint8))
    source.close()
    assert not list(source.names)


def test_config_equals_the_original(tmp_path: Path) -> None:
    assert gguf_model(GGUFFile(write_gguf(tmp_path / "a.gguf", hf_tensors())))[0] == CONFIG
    untied = gguf_model(GGUFFile(write_gguf(tmp_path / "b.gguf", hf_tensors(tied=False))))[0]
    assert untied == CONFIG | {"tie_word_embeddings": False}


def _reference_llama3_factors(theta: float, factor: float, low: float, high: float, original: int) -> list[float]:
    """Frequency divisors, written out case by case from the description of Llama 3.1's scaling."""
    result = []
    for i in range(0, D, 2):
        wavelength = 2 * math.pi * theta ** (i / D)
        if wavelength < original / high:
            result.append(1.0)
        elif wavelength > original / low:
            result.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            result.append(1.0 / ((1 - smooth) / factor + smooth))
    return result


@pytest.mark.parametrize(("factor", "high", "original"), [(8.0, 4.0, 8192), (32.0, 16.0, 1024)])
def test_llama3_rope_scaling_is_recovered(tmp_path: Path, factor: float, high: float, original: int) -> None:
    factors = np.array(_reference_llama3_factors(500.0, factor, 1.0, high, original // 16))
    path = write_gguf(
        tmp_path / "a.gguf",
        hf_tensors(),
        extra={"llama.rope.freq_base": (500.0, GGUFValueType.FLOAT32)},
        rope_factors=factors,
    )
    file = GGUFFile(path)
    assert gguf_model(file)[0]["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original // 16,
    }
    assert "rope_freqs.weight" not in gguf_model(file)[1].names


def test_other_rope_factors_are_refused_and_ones_mean_none(tmp_path: Path) -> None:
    odd = write_gguf(tmp_path / "a.gguf", hf_tensors(), rope_factors=np.linspace(1, 9, D // 2) ** 2)
    with pytest.raises(ModelError, match="do not follow Llama 3 scaling"):
        gguf_model(GGUFFile(odd))[0]
    ones = write_gguf(tmp_path / "b.gguf", hf_tensors(), rope_factors=np.ones(D // 2))
    assert gguf_model(GGUFFile(ones))[0]["rope_scaling"] is None


U32, F32, STR = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING


def test_linear_rope_scaling(tmp_path: Path) -> None:
    extra = {"llama.rope.scaling.type": ("linear", STR), "llama.rope.scaling.factor": (4.0, F32)}
    config = gguf_model(GGUFFile(write_gguf(tmp_path / "a.gguf", hf_tensors(), extra=extra)))[0]
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.attention.sliding_window": (64, U32)}, "not understood.*llama.attention.sliding_window"),
        ({"llama.expert_used_count": (2, U32)}, "mixtures of experts"),
        ({"llama.attention.key_length": (32, U32)}, "rope.dimension_count=16, expected the head size 32"),
        ({"llama.attention.value_length": (8, U32)}, "value_length=8"),
        ({"llama.rope.freq_base": (-1.0, F32)}, "freq_base=-1.0, expected a finite positive"),
        ({"llama.rope.freq_base": ("big", STR)}, "freq_base='big', expected int or float"),
        ({"llama.rope.scaling.type": ("longrope", STR)}, "'longrope' is not supported"),
    ],
)
def test_metadata_that_would_change_the_computation_is_refused(tmp_path: Path, extra: dict, message: str) -> None:
    file = GGUFFile(write_gguf(tmp_path / "a.gguf", hf_tensors(), extra=extra))
    with pytest.raises(ModelError, match=message):
        gguf_model(file)[0]


def test_an_unknown_architecture_is_named_with_the_known_ones(tmp_path: Path) -> None:
    file = GGUFFile(write_gguf(tmp_path / "a.gguf", hf_tensors(), architecture="mamba"))
    with pytest.raises(ModelError, match=r"'mamba' is not supported from GGUF; supported: .*llama"):
        gguf_model(file)[0]
    with pytest.raises(ModelError, match="mamba"):
        gguf_model(file)[1]


@pytest.mark.real
def test_config_of_the_default_model(default_gguf: Path) -> None:
    config = gguf_model(GGUFFile(default_gguf))[0]
    assert config == {
        **CONFIG,
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
    }
