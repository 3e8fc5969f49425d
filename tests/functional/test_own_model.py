"""A model that a user has written: served with pages, chunks and prefixes, scored, differentiated, and cut over a mesh."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_infer import LLM, SamplingParams
from llm_infer.base.errors import ModelError, UserError
from llm_infer.checkpoints import save
from llm_infer.functional import LoadedModel, ModelConfig, decode_step, make_cache, register_model, token_logprobs

ROOT = Path(__file__).parents[2]
WIDTH, HEADS, KV_HEADS, SIZE, VOCAB = 32, 4, 2, 8, 64
CONFIG = ModelConfig("MyTransformer", VOCAB, WIDTH, 2, HEADS, KV_HEADS, SIZE, 64, 128)
CUTS = {
    **{f"layers.{i}.{name}": ("kv_heads" if name in "kv" else "heads", "embed") for i in range(2) for name in "qkv"},
    **{f"layers.{i}.o": ("embed", "heads") for i in range(2)},
}


def weights(seed: int = 0) -> dict[str, Any]:
    keys = iter(jax.random.split(jax.random.key(seed), 20))

    def matrix(rows: int, columns: int) -> jax.Array:
        return jax.random.normal(next(keys), (rows, columns)) * columns**-0.5

    shapes = {"q": (HEADS * SIZE, WIDTH), "k": (KV_HEADS * SIZE, WIDTH), "v": (KV_HEADS * SIZE, WIDTH)}
    shapes |= {"o": (WIDTH, HEADS * SIZE), "mlp": (WIDTH, WIDTH)}
    layers = [{name: matrix(*shape) for name, shape in shapes.items()} for _ in range(2)]
    return {"table": matrix(VOCAB, WIDTH) * 4, "places": matrix(128, WIDTH), "layers": layers}


def forward(params: Any, config: ModelConfig, ids: Any, positions: Any, cache: Any, attend: Any) -> tuple[Any, Any]:
    def heads(x: jax.Array, matrix: jax.Array) -> jax.Array:
        return (x @ matrix.T).reshape(len(x), -1, SIZE)

    x = params["table"][ids] + params["places"][positions]
    for number, layer in enumerate(params["layers"]):
        query, key, value = (heads(jnp.tanh(x), layer[name]) for name in "qkv")
        out, cache = attend(query, key, value, cache, jnp.int32(number), scale=SIZE**-0.5)
        out = out.reshape(len(x), -1) @ layer["o"].T
        x = x + (jax.lax.psum(out, config.shards.axes) if config.shards.axes else out)
        x = x + jax.nn.gelu(x @ layer["mlp"].T)
    return x, cache


def logits(params: Any, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    return jnp.tanh(hidden) @ params["table"].T


def whole(params: Any, ids: Any) -> jax.Array:
    """Logits of all tokens, by attention over the whole sequence."""

    def attend(query: Any, key: Any, value: Any, cache: Any, layer: Any, *, scale: float) -> tuple[jax.Array, None]:
        key, value = (jnp.repeat(each, HEADS // KV_HEADS, axis=1) for each in (key, value))
        scores = jnp.einsum("qhd,khd->hqk", query, key) * scale
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[1:], bool))[None], scores, -jnp.inf)
        return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), value), None

    hidden, _ = forward(params, CONFIG, jnp.asarray(ids), jnp.arange(len(ids)), None, attend)
    return logits(params, CONFIG, hidden)


best_tokens = jax.jit(lambda params, ids: whole(params, ids).argmax(axis=-1))


def expected_tokens(params: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        padded = jnp.array([*ids, *[0] * (24 - len(ids))])
        ids.append(int(best_tokens(params, padded)[len(ids) - 1]))
    return ids[len(prompt) :]


PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [40, 41], [1, 2, 3, 4]]


def serve(model: LoadedModel) -> LLM:
    return LLM.from_model(model, max_num_seqs=2, max_num_batched_tokens=8, num_pages=30, progress=False)


def test_it_is_served_updated_scored_and_differentiated() -> None:
    params = weights()
    model = register_model(CONFIG, forward, logits, params)
    llm, greedy = serve(model), SamplingParams(temperature=0.0, max_tokens=5, logprobs=0)
    for _ in range(2):  # the second time from cached pages
        found = llm.generate(PROMPTS, greedy)
        assert [one.outputs[0].token_ids for one in found] == [expected_tokens(params, p, 5) for p in PROMPTS]
    rollout = llm.rollout(PROMPTS, greedy)
    scored = jax.jit(partial(token_logprobs, model))(model.params, rollout.token_ids)
    np.testing.assert_allclose(np.asarray(scored)[rollout.mask], rollout.logprobs[rollout.mask], atol=1e-4)

    ids = rollout.token_ids[:1, :10]
    ours = jax.jit(jax.grad(lambda params: token_logprobs(model, params, ids).sum()))(params)  # the user's own tree
    of = lambda params: jnp.take_along_axis(jax.nn.log_softmax(whole(params, ids[0]))[:-1], ids[0, 1:, None], 1).sum()  # noqa: E731
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), ours, jax.jit(jax.grad(of))(params))
    last, _ = jax.jit(partial(decode_step, model))(model.params, make_cache(model, 1, 32), ids)
    np.testing.assert_allclose(last[0], whole(params, ids[0].tolist())[-1], atol=1e-4)

    llm.update_weights(weights(1))
    (found,) = llm.generate(PROMPTS[:1], greedy)
    assert found.outputs[0].token_ids == expected_tokens(weights(1), PROMPTS[0], 5)
    with pytest.raises(ModelError, match="the model has no parameter nothing"):
        llm.update_weights({"nothing": np.zeros(3)})
    assert llm.embed(PROMPTS[1])[0].embedding


def test_what_cannot_be_registered() -> None:
    with pytest.raises(UserError, match="is built in"):
        register_model(ModelConfig("LlamaForCausalLM", 64, 32, 2, 4, 2, 8, 64, 128), forward, logits, weights())
    with pytest.raises(UserError, match=r"cuts: there is no parameter layers\.q"):
        register_model(CONFIG, forward, logits, weights(), cuts={"layers.q": ("heads", "embed")})
    with pytest.raises(UserError, match=r"cuts: table \[64, 32\].*expected one name"):
        register_model(CONFIG, forward, logits, weights(), cuts={"table": ("vocab",)})
    with pytest.raises(UserError, match=r"two parameters have the name a\.b"):
        register_model(CONFIG, forward, logits, {"a": {"b": np.ones(2)}, "a.b": np.ones(2)})
    with pytest.raises(UserError, match="params: a is str, expected an array"):
        register_model(CONFIG, forward, logits, {"a": "b"})
    doubles = {"table": np.ones((3, 3)), "factor": 2.0}
    assert register_model(CONFIG, forward, logits, doubles).dtype == jnp.float32


def test_functions_that_do_not_fit_their_config() -> None:
    ids = np.array([PROMPTS[2]])
    for message, changed in {
        r"attend: key has the shape \[4, 2, 8\], the config says \[4, 4, 8\]": {"num_kv_heads": 4},
        "attend: layer 1, the config says num_layers=1": {"num_layers": 1},
        r"logits returned \[4, 64\], the config says \[4, 99\]": {"vocab_size": 99},
    }.items():
        model = register_model(replace(CONFIG, **changed), forward_by_number, logits, weights())
        with pytest.raises(ValueError, match=message):
            token_logprobs(model, model.params, ids)
    with pytest.raises(ModelError, match="no file's"):
        save(model, "nowhere")


def forward_by_number(params: Any, config: ModelConfig, ids: Any, positions: Any, cache: Any, attend: Any) -> tuple:
    def by_number(query: Any, key: Any, value: Any, cache: Any, layer: Any, **options: Any) -> tuple:
        return attend(query, key, value, cache, int(layer), **options)

    return forward(params, config, ids, positions, cache, by_number)


def on_a_mesh() -> None:
    """Run in a process of its own, with four devices."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
    model = register_model(CONFIG, forward, logits, weights(), mesh=mesh, cuts=CUTS)
    found = serve(model).generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=5))
    assert [one.outputs[0].token_ids for one in found] == [expected_tokens(weights(), p, 5) for p in PROMPTS]
    ids = np.array([PROMPTS[0][:6], PROMPTS[0][3:9]])
    one = register_model(CONFIG, forward, logits, weights())
    found, expected = (jax.jit(partial(token_logprobs, each))(each.params, ids) for each in (model, one))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_over_a_mesh() -> None:
    code = "import os; os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=4'\n"
    code += "from tests.functional.test_own_model import on_a_mesh; on_a_mesh()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
