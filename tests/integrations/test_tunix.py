"""Rollouts of Tunix on an LLM: tokens, log-probabilities and training steps, against Tunix's own engine."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("tunix", reason="google-tunix is not installed")
    import optax
    from tunix.models.gemma3 import model as gemma3
    from tunix.models.llama3 import model as llama3
    from tunix.models.qwen2 import model as qwen2
    from tunix.models.qwen3 import model as qwen3
    from tunix.rl import rl_cluster
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rollout.base_rollout import CacheConfig, RolloutConfig
    from tunix.rl.rollout.vanilla_rollout import VanillaRollout

from llm_infer import LLM, ModelError, UserError, load_model
from llm_infer.integrations.tunix import LLMRollout

pytestmark = pytest.mark.filterwarnings("ignore")  # Tunix's own

VOCABULARY = 64
PROMPTS = ["hello world", "a", "the quick brown fox"]
SIZES = dict(embed_dim=32, hidden_dim=64, num_heads=4, num_kv_heads=2, head_dim=16)
LAYERS = {"llama3": 2, "qwen3": 2, "qwen2": 2, "gemma3": 6}
THETA = 1_000_000  # Tunix's Llama 3 and Qwen 3 rotate with this, whatever their configuration has
TOLERANCE = 1e-5


class Letters:
    """A token for each letter, as Tunix wants tokenizers."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [3 + (ord(letter) - 32) % (VOCABULARY - 3) for letter in text]

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(32 + token - 3) for token in ids)

    def bos_id(self) -> int:
        return 2

    def eos_id(self) -> int:
        return 1

    def pad_id(self) -> int:
        return 0


@pytest.fixture(autouse=True)
def lenient() -> Iterator[None]:
    """Tunix adds arrays of other ranks and types to each other, also in threads of its own."""
    names = ("jax_numpy_rank_promotion", "jax_numpy_dtype_promotion")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, ("allow", "standard"), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def actor(name: str, seed: int = 0) -> nnx.Module:
    """A model of Tunix with other values than its first ones, which are ones or zeros in places."""
    sizes: dict[str, Any] = dict(vocab_size=VOCABULARY, num_layers=LAYERS[name], norm_eps=1e-6, **SIZES)
    if name == "llama3":
        made = llama3.Llama3(llama3.ModelConfig(**sizes, rope_theta=THETA, weight_tying=True), rngs=nnx.Rngs(seed))
    elif name == "qwen3":
        made = qwen3.Qwen3(qwen3.ModelConfig(**sizes, rope_theta=THETA), rngs=nnx.Rngs(seed))
    elif name == "qwen2":
        made = qwen2.Qwen2(qwen2.ModelConfig(**sizes, rope_theta=THETA), rngs=nnx.Rngs(seed))
    else:
        config = gemma3.ModelConfig(
            num_layers=LAYERS[name],
            num_embed=VOCABULARY,
            sliding_window_size=8,
            global_base_frequency=THETA,
            param_dtype=jnp.float32,
            **SIZES,
        )
        made = gemma3.Gemma3(config, rngs=nnx.Rngs(seed))
    state, draws = nnx.state(made, nnx.Param), np.random.default_rng(seed)
    nnx.update(made, jax.tree.map(lambda x: x + 0.05 * draws.standard_normal(x.shape).astype(np.float32), state))
    return made


def empty_llm(name: str, folder: Path, **settings: Any) -> LLM:
    """An LLM of the actor's shape with other weights, and no tokenizer."""
    config = {
        "architectures": [f"{name.title().replace('Llama3', 'Llama')}ForCausalLM"],
        "model_type": {"llama3": "llama", "gemma3": "gemma3_text"}.get(name, name),
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS[name],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": THETA,
        "max_position_embeddings": 128,
        "tie_word_embeddings": name in ("llama3", "gemma3"),
        "hidden_act": "silu",
    }
    if name == "gemma3":
        del config["hidden_act"]
        config |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 16,
            "rope_local_base_freq": 10_000,
        }
        config |= {"sliding_window": 8, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(folder, load_format="dummy", weights="dense", skip_tokenizer_init=True, progress=False)
    return LLM.from_model(model, num_pages=64, progress=False, **settings)


def both(name: str, folder: Path, **settings: Any) -> tuple[LLMRollout, VanillaRollout]:
    module = actor(name)
    cache = CacheConfig(cache_size=64, num_layers=LAYERS[name], num_kv_heads=2, head_dim=16)
    ours = LLMRollout(llm=empty_llm(name, folder, **settings), rollout_actor=module, tokenizer=Letters())
    return ours, VanillaRollout(module, Letters(), cache)


@pytest.mark.parametrize("name", LAYERS)
def test_greedy_tokens_and_log_probabilities_are_those_of_tunix(name: str, tmp_path: Path) -> None:
    ours, theirs = both(name, tmp_path)
    settings = dict(max_tokens_to_generate=12, max_prompt_length=24, return_logprobs=True, kv_cache_size=64)
    found = ours.generate(PROMPTS, RolloutConfig(**settings, temperature=0.0))
    expected = theirs.generate(PROMPTS, RolloutConfig(**settings, top_p=None))  # that is greedy there
    np.testing.assert_array_equal(found.left_padded_prompt_tokens, expected.left_padded_prompt_tokens)
    rows = zip(found.text, found.tokens, found.logprobs, expected.text, expected.tokens, expected.logprobs, strict=True)
    for text, tokens, logprobs, same_text, same, close in rows:
        assert len(tokens) == len(logprobs)
        assert tokens[-1] == 1 or text == Letters().decode(tokens.tolist())
        # Tunix hides padding that is drawn from what follows it.
        seen = next((place + 1 for place, token in enumerate(same) if token == 0), len(same))
        np.testing.assert_array_equal(tokens[:seen], same[:seen])  # ours may have the end of sequence behind it
        np.testing.assert_allclose(logprobs[:seen], close[:seen], atol=TOLERANCE)
        assert text[:seen] == same_text[:seen] and (seen < len(same) or text == same_text)


@pytest.mark.parametrize("name", LAYERS)
def test_scores_are_those_of_tunix(name: str, tmp_path: Path) -> None:
    ours, theirs = both(name, tmp_path)
    prompts = jnp.asarray([[0, 0, 2, 5, 9], [2, 7, 8, 9, 10], [0, 0, 0, 2, 4]], jnp.int32)
    completions = jnp.asarray([[11, 12, 13, 1], [20, 30, 0, 0], [0, 0, 0, 0]], jnp.int32)
    found, expected = (each.get_per_token_logps(prompts, completions) for each in (ours, theirs))
    mask = np.asarray(completions) != 0
    assert found.shape == completions.shape and np.all(np.asarray(found)[~mask] == 0)
    np.testing.assert_allclose(np.asarray(found)[mask], np.asarray(expected)[mask], atol=TOLERANCE)


def test_log_probabilities_of_draws_are_those_at_the_temperature(tmp_path: Path) -> None:
    ours, theirs = both("llama3", tmp_path, logprobs_mode="processed_logprobs")
    config = RolloutConfig(max_tokens_to_generate=8, temperature=0.5, seed=jax.random.key(3), return_logprobs=True)
    found = ours.generate(["hello"] * 4, config)
    assert len({tuple(row.tolist()) for row in found.tokens}) > 1  # a group's answers differ
    again = ours.generate(["hello"] * 4, config)
    for row, same in zip(found.tokens, again.tokens, strict=True):
        np.testing.assert_array_equal(row, same)
    graph, state = nnx.split(theirs.model())
    for prompt, row, logprobs in zip(found.left_padded_prompt_tokens, found.tokens, found.logprobs, strict=True):
        ids = jnp.asarray([*prompt[prompt != 0], *row])[None]
        mask = jnp.tril(jnp.ones((1, ids.shape[1], ids.shape[1]), bool))
        logits, _ = nnx.merge(graph, state)(ids, jnp.arange(ids.shape[1])[None], None, mask)
        all_of_them = jax.nn.log_softmax(logits[0, -len(row) - 1 : -1] / 0.5)
        np.testing.assert_allclose(logprobs, all_of_them[np.arange(len(row)), row], atol=TOLERANCE)


def test_new_weights_are_followed_and_not_held(tmp_path: Path) -> None:
    ours, theirs = both("llama3", tmp_path)
    other = actor("llama3", seed=1)
    state = nnx.state(other, nnx.Param)
    rows = jnp.asarray([[2, 5, 9]]), jnp.asarray([[11, 12, 13]])
    expected = VanillaRollout(other, Letters(), CacheConfig(64, 2, 2, 16)).get_per_token_logps(*rows)
    assert np.abs(np.asarray(expected) - theirs.get_per_token_logps(*rows)).max() > 0.05
    with jax.transfer_guard_device_to_host("disallow_explicit"), jax.transfer_guard_host_to_device("disallow_explicit"):
        ours.update_params(state, (nnx.Param,))  # as Tunix calls it on CPUs
    for array in jax.tree.leaves(state):
        array.delete()
    np.testing.assert_allclose(ours.get_per_token_logps(*rows), expected, atol=TOLERANCE)
    assert ours.llm.weights_version == "update-2"


def test_the_end_of_an_answer_is_a_token_and_no_text(tmp_path: Path) -> None:
    ours, _ = both("llama3", tmp_path)
    config = RolloutConfig(max_tokens_to_generate=8, temperature=0.0)
    third = int(ours.generate(PROMPTS[:1], config).tokens[0][2])
    config.eos_tokens = [third]
    found = ours.generate(PROMPTS[:1], config)
    assert found.tokens[0][-1] == third and found.logprobs is None
    assert found.text[0] == Letters().decode(found.tokens[0][:-1].tolist())


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_steps_of_grpo(name: str, tmp_path: Path) -> None:
    """The learner takes its answers from here, and its weights come here after each step."""
    llm, module = empty_llm(name, tmp_path, logprobs_mode="processed_logprobs"), actor(name)
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    cluster = rl_cluster.RLCluster(
        actor=module,
        reference=actor(name),
        tokenizer=Letters(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(
                (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT), mesh
            ),
            rollout_engine=partial(LLMRollout, llm=llm),
            offload_to_cpu=False,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.sgd(0.5), eval_every_n_steps=10, max_steps=4, mini_batch_size=2
            ),
            rollout_config=RolloutConfig(max_tokens_to_generate=8, max_prompt_length=16, temperature=0.9),
        ),
    )
    seen: list[list[str]] = []

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        seen.append(list(completions))
        return [float(len(set(text))) for text in completions]

    first = llm.weights_digest()
    learner = GRPOLearner(
        cluster, algo_config=GRPOConfig(num_generations=4, num_iterations=2, beta=0.04), reward_fns=[reward]
    )
    learner.train([{"prompts": np.array(["hello", "world"])}, {"prompts": np.array(["abc", "xyz"])}])
    assert len(seen) >= 2 and all(len(answers) == 8 for answers in seen[:2])
    assert (
        llm.weights_version == "update-3" and llm.weights_digest() != first
    )  # the actor's, and after two global steps
    prompt, answer = jnp.asarray([[2, 5, 9]]), jnp.asarray([[11, 12, 13]])
    other = VanillaRollout(cluster.actor_trainer.model, Letters(), CacheConfig(64, 2, 2, 16))
    np.testing.assert_allclose(
        cluster.rollout.get_per_token_logps(prompt, answer), other.get_per_token_logps(prompt, answer), atol=TOLERANCE
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(rollout_vllm_hbm_utilization=0.9), "rollout_vllm_hbm_utilization: settings of other engines"),
        (dict(tensor_parallel_size=2, rollout_vllm_kwargs={"a": 1}), "tensor_parallel_size, rollout_vllm_kwargs"),
        (dict(data_type=jnp.bfloat16), "data_type=bfloat16: the LLM has float32"),
        (dict(return_logprobs=True, temperature=0.5), "logprobs_mode='processed_logprobs'"),
        (dict(max_tokens_to_generate=100), "exceed the context of 128"),
        (dict(top_p=0.0), "top_p"),
    ],
)
def test_what_a_configuration_may_not_ask_for(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    llm = empty_llm("llama3", tmp_path)
    with pytest.raises(UserError, match=message):
        LLMRollout(llm=llm, tokenizer=Letters(), rollout_config=RolloutConfig(**settings))
    with pytest.raises(UserError, match=message):
        LLMRollout(llm=llm, tokenizer=Letters()).generate(PROMPTS, RolloutConfig(**settings))


def test_what_else_is_refused(tmp_path: Path) -> None:
    llm = empty_llm("llama3", tmp_path)
    rollout = LLMRollout(llm=llm, tokenizer=Letters())
    state = nnx.state(actor("llama3"), nnx.Param)
    with pytest.raises(UserError, match="beam_size: not supported"):
        rollout.generate(PROMPTS, RolloutConfig(), beam_size=2)
    with pytest.raises(UserError, match="names: without a rollout_actor"):
        rollout.update_params(state)
    with pytest.raises(UserError, match="no table of names for Linear"):
        LLMRollout(llm=llm, tokenizer=Letters(), rollout_actor=nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match="LoRA"):
        rollout.update_params(state, (nnx.LoRAParam,))
    with pytest.raises(UserError, match="LoRA"):
        rollout.update_params(nnx.state(nnx.LoRA(2, 1, 2, rngs=nnx.Rngs(0))))
    with pytest.raises(ModelError, match="which the model does not have"):
        LLMRollout(llm=llm, tokenizer=Letters(), rollout_actor=actor("qwen3"))
    with pytest.raises(UserError, match=r"100 tokens of a prompt"):
        rollout.generate(["x" * 99], RolloutConfig())
