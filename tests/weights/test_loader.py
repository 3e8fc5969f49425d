"""Filling parameters: stacking, fusing, conversion, one message for all that does not fit, memory on the real file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from io import StringIO
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_infer.base.errors import ModelError
from llm_infer.base.progress import Progress
from llm_infer.models.opened import gguf_model
from llm_infer.weights.aligned import aligned_empty
from llm_infer.weights.gguf import GGUFFile
from llm_infer.weights.loader import load_parameters
from llm_infer.weights.rules import Rule, fuse_qkv
from tests.weights.tiny_models import HKV, HQ, D, E, F, L, V, hf_tensors, write_gguf


class Arrays:
    """A TensorSource over arrays in memory."""

    description = "arrays"

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors, self.reads = tensors, 0

    @property
    def names(self) -> Iterable[str]:
        return self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self.tensors[name].dtype

    def read_into(self, name: str, out: np.ndarray) -> None:
        self.reads += 1
        np.copyto(out, self.tensors[name], casting="unsafe")

    def stored_kind(self, name: str) -> None:
        """Plain values only."""
        return None

    def stored(self, name: str) -> None:
        """Plain values only."""
        return None

    def close(self) -> None:
        self.tensors = {}


BLOCK = "model.layers.{layer}."
RULES = [
    Rule("embed", ("model.embed_tokens.weight",)),
    Rule("norm", (BLOCK + "input_layernorm.weight",)),
    Rule("qkv", tuple(BLOCK + f"self_attn.{n}_proj.weight" for n in "qkv"), arrange=fuse_qkv(HKV, D)),
    Rule("o", (BLOCK + "self_attn.o_proj.weight",)),
    Rule("mlp_norm", (BLOCK + "post_attention_layernorm.weight",)),
    *(Rule(n, (BLOCK + f"mlp.{n}_proj.weight",)) for n in ("gate", "up", "down")),
    Rule("final_norm", ("model.norm.weight",)),
]


def _specs(dtype: object = np.float32) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = {
        "embed": (V, E),
        "norm": (L, E),
        "qkv": (L, (HQ + 2 * HKV) * D, E),
        "o": (L, E, HQ * D),
        "mlp_norm": (L, E),
        "gate": (L, F, E),
        "up": (L, F, E),
        "down": (L, E, F),
        "final_norm": (E,),
    }
    return {name: jax.ShapeDtypeStruct(shape, np.dtype(dtype)) for name, shape in shapes.items()}  # type: ignore[arg-type]


def test_parameters_are_stacked_and_fused(tmp_path: Path) -> None:
    tensors = hf_tensors()
    source = gguf_model(GGUFFile(write_gguf(tmp_path / "a.gguf", tensors)))[1]
    parameters = load_parameters(source, _specs(), RULES, num_layers=L)
    assert {name: array.shape for name, array in parameters.items()} == {n: s.shape for n, s in _specs().items()}
    np.testing.assert_array_equal(parameters["embed"], tensors["model.embed_tokens.weight"])
    for layer in range(L):
        block = f"model.layers.{layer}."
        np.testing.assert_array_equal(parameters["down"][layer], tensors[block + "mlp.down_proj.weight"])
        # Row by row: for each KV head its query heads, then its key, then its value.
        rows = []
        group = HQ // HKV
        for kv_head in range(HKV):
            queries = tensors[block + "self_attn.q_proj.weight"].reshape(HQ, D, E)
            rows += list(queries[kv_head * group : (kv_head + 1) * group])
            rows += [tensors[block + f"self_attn.{n}_proj.weight"].reshape(HKV, D, E)[kv_head] for n in "kv"]
        np.testing.assert_array_equal(parameters["qkv"][layer], np.concatenate(rows))


def test_conversion_and_placement() -> None:
    tensors = {name: values.astype(jnp.bfloat16) for name, values in hf_tensors().items()}
    specs = {n: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16) for n, s in _specs().items()}
    placed = []

    def place(name: str, array: np.ndarray) -> jax.Array:
        placed.append(name)
        return jax.device_put(array, jax.devices()[0])

    parameters = load_parameters(Arrays(tensors), specs, RULES, num_layers=L, place=place)
    assert placed == list(parameters) == [rule.param for rule in RULES]
    assert all(array.dtype == jnp.bfloat16 for array in parameters.values())
    np.testing.assert_array_equal(parameters["up"][1], tensors["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.uint8])
def test_the_cpu_takes_an_aligned_array_over_without_copying(dtype: type) -> None:
    array = aligned_empty((3, 50, 7), dtype)
    array[...] = 1
    if jax.default_backend() == "cpu":
        assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data


def test_fuse_qkv_takes_biases_and_refuses_what_does_not_divide() -> None:
    q, k, v = np.arange(8), np.arange(100, 104), np.arange(200, 204)
    fused = fuse_qkv(num_kv_heads=2, head_dim=2)([q, k, v])
    assert fused.tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]
    with pytest.raises(ValueError, match="7 rows"):
        fuse_qkv(2, 2)([q[:7], k, v])


def test_all_problems_are_in_one_message_and_nothing_is_read() -> None:
    tensors = hf_tensors()
    del tensors["model.norm.weight"]
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((F, E + 1), np.float32)
    tensors["model.layers.0.self_attn.v_proj.weight"] = np.zeros((HKV * D - 1, E), np.float32)
    tensors["model.layers.0.self_attn.o_proj.weight"] = np.zeros((E, HQ * D), np.int8)
    tensors |= {f"model.layers.{i}.extra.weight": np.zeros(1, np.float32) for i in range(12)}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(1, np.float32)
    source = Arrays(tensors)
    with pytest.raises(ModelError) as caught:
        load_parameters(source, _specs(), RULES, num_layers=L, ignore=[r".*rotary_emb\.inv_freq"])
    assert source.reads == 0
    message = str(caught.value)
    assert "missing (2): model.layers.1.self_attn.k_proj.weight, model.norm.weight" in message
    assert "wrong shape (2): " in message and f"up_proj.weight [{F}, {E + 1}] for [{F}, {E}]" in message
    assert f"v_proj.weight [{HKV * D - 1}, {E}]" in message
    assert "not floats (1): model.layers.0.self_attn.o_proj.weight (int8)" in message
    assert "surplus (12): model.layers.0.extra.weight, model.layers.1.extra.weight, model.layers.2" in message
    assert message.count(".extra.weight") == 10 and "…" in message
    assert "inv_freq" not in message


def test_more_layers_than_the_file_has() -> None:
    tensors = hf_tensors()
    specs = _specs() | {"norm": jax.ShapeDtypeStruct((L + 1, E), np.dtype(np.float32))}
    with pytest.raises(ValueError, match="stacked over 2 layers, its rule names 3"):
        load_parameters(Arrays(tensors), _specs(), RULES, num_layers=L + 1)
    with pytest.raises(ModelError, match="config says 1000000000 layers"):
        load_parameters(Arrays(tensors), specs, RULES, num_layers=10**9)


def test_optional_parameters() -> None:
    tensors = hf_tensors()
    head = Rule("head", ("lm_head.weight",), optional=True)
    with_head = tensors | {"lm_head.weight": np.ones((V, E), np.float32)}
    spec = {"head": jax.ShapeDtypeStruct((V, E), np.dtype(np.float32))}
    # In the model and in the file; in the model only; in the file only.
    assert "head" in load_parameters(Arrays(with_head), _specs() | spec, [*RULES, head], num_layers=L)
    assert "head" not in load_parameters(Arrays(tensors), _specs() | spec, [*RULES, head], num_layers=L)
    assert "head" not in load_parameters(Arrays(with_head), _specs(), [*RULES, head], num_layers=L)
    with pytest.raises(ModelError, match=r"missing \(1\): lm_head.weight"):
        required = Rule("head", ("lm_head.weight",))
        load_parameters(Arrays(tensors), _specs() | spec, [*RULES, required], num_layers=L)


def test_rules_that_do_not_match_the_parameters_are_a_programming_error() -> None:
    with pytest.raises(ValueError, match="parameters without a rule \\['embed'\\]"):
        load_parameters(Arrays(hf_tensors()), _specs(), RULES[1:], num_layers=L)
    with pytest.raises(ValueError, match="rules without a parameter \\['head'\\]"):
        load_parameters(Arrays(hf_tensors()), _specs(), [*RULES, Rule("head", ("lm_head.weight",))], num_layers=L)
    with pytest.raises(ValueError, match="need an `arrange`"):
        Rule("x", ("a", "b"))
    with pytest.raises(ValueError, match="either all"):
        Rule("x", ("a", "b{layer}"), arrange=fuse_qkv(1, 1))


def test_progress_counts_the_bytes() -> None:
    stream = StringIO()
    load_parameters(Arrays(hf_tensors()), _specs(), RULES, num_layers=L, progress=Progress(stream=stream, delay=60))
    assert stream.getvalue() == ""  # too short to mention


MEMORY_SCRIPT = """
import json, re, sys, threading, time
import jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from llm_infer.models.opened import open_model
from llm_infer.weights.sources import ModelSource
from llm_infer.weights.loader import load_parameters
from llm_infer.weights.rules import Rule, fuse_qkv

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

L, E, F, V, Hq, Hkv, D = 30, 576, 1536, 49152, 9, 3, 64
block = "model.layers.{layer}."
table = {
    "embed": ((V, E), "model.embed_tokens"), "norm": ((L, E), block + "input_layernorm"),
    "o": ((L, E, Hq * D), block + "self_attn.o_proj"), "mlp_norm": ((L, E), block + "post_attention_layernorm"),
    "gate": ((L, F, E), block + "mlp.gate_proj"), "up": ((L, F, E), block + "mlp.up_proj"),
    "down": ((L, E, F), block + "mlp.down_proj"), "final_norm": ((E,), "model.norm"),
}
rules = [Rule(name, (tensor + ".weight",)) for name, (_, tensor) in table.items()]
rules.append(Rule("qkv", tuple(block + f"self_attn.{n}_proj.weight" for n in "qkv"), arrange=fuse_qkv(Hkv, D)))
specs = {name: jax.ShapeDtypeStruct(shape, np.dtype(np.float32)) for name, (shape, _) in table.items()}
specs["qkv"] = jax.ShapeDtypeStruct((L, (Hq + 2 * Hkv) * D, E), np.dtype(np.float32))

jnp.zeros(2).block_until_ready()
before, peak, done = anonymous(), 0, threading.Event()

def sample():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())

thread = threading.Thread(target=sample)
thread.start()
started = time.perf_counter(), time.process_time()
model = open_model(ModelSource("default", "gguf", Path(sys.argv[1])))
parameters = load_parameters(model.tensors, specs, rules, num_layers=L)
wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
done.set(); thread.join()
total = sum(array.nbytes for array in parameters.values())
sums = {name: float(jnp.sum(jnp.abs(array.astype(jnp.float32)))) for name, array in parameters.items()}
print(json.dumps({"bytes": total, "peak": peak - before, "wall": wall, "cpu": cpu, "sums": sums}))
"""


@pytest.mark.real
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from Linux's /proc")
def test_memory_and_time_of_loading_the_default_model(default_gguf: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(default_gguf)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    print(
        f"{result['bytes'] / 1e6:.0f} MB of parameters, peak {result['peak'] / result['bytes']:.3f} of that, "
        f"{result['wall']:.2f} s, {result['cpu']:.2f} s of CPU time"
    )
    assert result["bytes"] == 134_515_008 * 4
    assert result["peak"] <= 1.3 * result["bytes"]
    assert all(np.isfinite(value) and value > 0 for value in result["sums"].values())


def test_the_message_lists_naturally_sorted_layers() -> None:
    tensors = hf_tensors() | {f"model.layers.{i}.x": np.zeros(1, np.float32) for i in (10, 9, 2)}
    with pytest.raises(ModelError) as caught:
        load_parameters(Arrays(tensors), _specs(), RULES, num_layers=L)
    assert re.findall(r"layers\.(\d+)\.x", str(caught.value)) == ["2", "9", "10"]
