"""Loading 1 GB of bfloat16 in its own type raises anonymous memory by little more than its size, and shows progress."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

V, E, F, L, HQ, HKV, D = 32768, 2048, 8192, 8, 16, 4, 128
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": V,
    "hidden_size": E,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": HQ,
    "num_key_value_heads": HKV,
    "head_dim": D,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}

SCRIPT = """
import json, re, sys, threading, time
from io import StringIO
from pathlib import Path
import jax, jax.numpy as jnp
from llm_infer.models.load import load_model
from llm_infer.base.progress import Progress
from llm_infer.models.opened import open_model
from llm_infer.weights.sources import resolve

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

jnp.zeros(2).block_until_ready()
before, peak, done = anonymous(), 0, threading.Event()

def sample():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())

thread = threading.Thread(target=sample)
thread.start()
shown, started = StringIO(), time.perf_counter()
model = load_model(open_model(resolve(sys.argv[1])), dtype=jnp.bfloat16, progress=Progress(stream=shown, delay=0))
wall = time.perf_counter() - started
done.set(); thread.join()
total = sum(array.nbytes for array in model.params.values())
print(json.dumps({"bytes": total, "peak": peak - before, "wall": wall, "shown": shown.getvalue()[-300:]}))
"""


def write_checkpoint(directory: Path) -> None:
    """One file a layer, with the index that names them; the values are one random block again and again."""
    block = np.random.default_rng(0).standard_normal(1 << 20).astype(ml_dtypes.bfloat16)

    def values(*shape: int) -> np.ndarray:
        return np.resize(block, shape)

    weight_map = {}
    for layer in range(L):
        name = f"model.layers.{layer}."
        tensors = {
            name + "input_layernorm.weight": values(E),
            name + "self_attn.q_proj.weight": values(HQ * D, E),
            name + "self_attn.k_proj.weight": values(HKV * D, E),
            name + "self_attn.v_proj.weight": values(HKV * D, E),
            name + "self_attn.o_proj.weight": values(E, HQ * D),
            name + "post_attention_layernorm.weight": values(E),
            name + "mlp.gate_proj.weight": values(F, E),
            name + "mlp.up_proj.weight": values(F, E),
            name + "mlp.down_proj.weight": values(E, F),
        }
        if layer == 0:
            tensors |= {"model.embed_tokens.weight": values(V, E), "model.norm.weight": values(E)}
        filename = f"model-{layer + 1:05}-of-{L:05}.safetensors"
        save_file(tensors, directory / filename)
        weight_map |= dict.fromkeys(tensors, filename)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(CONFIG))


@pytest.mark.sweep
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from Linux's /proc")
def test_peak_memory(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    print(
        f"{result['bytes'] / 1e9:.2f} GB, peak {result['peak'] / result['bytes']:.3f} of that, {result['wall']:.1f} s"
    )
    print(repr(result["shown"]))
    assert 0.9e9 < result["bytes"] < 1.2e9
    assert result["peak"] <= 1.3 * result["bytes"]
    assert "Loading weights" in result["shown"]
