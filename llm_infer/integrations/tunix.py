"""Serves the rollouts of Tunix (google-tunix 0.1.7) from an `LLM`: `rollout_engine=partial(LLMRollout, llm=llm)`.

Give `ClusterConfig(rollout_engine=…)` that `functools.partial`. Tunix then generates here, and brings its weights here after each
global step. Prompts and answers travel as token ids of Tunix's tokenizer, so the `LLM` needs no tokenizer of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.generate.tokenizer_adapter import TokenizerAdapter  # pyright: ignore[reportMissingImports]
from tunix.rl.rollout.base_rollout import (  # pyright: ignore[reportMissingImports]
    BaseRollout,
    RolloutConfig,
    RolloutOutput,
)

from llm_infer.base.errors import RequestError, UserError
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.llm import LLM
from llm_infer.models.import_tree import Names, from_tree
from llm_infer.models.tree_names import TUNIX_GEMMA3, TUNIX_LLAMA3, TUNIX_QWEN2, TUNIX_QWEN3

TABLES = MappingProxyType({"gemma3": TUNIX_GEMMA3, "llama3": TUNIX_LLAMA3, "qwen2": TUNIX_QWEN2, "qwen3": TUNIX_QWEN3})
"""Which names a model's weights have, by its package in tunix.models."""

FOLLOWED = frozenset(
    {
        *("max_tokens_to_generate", "temperature", "top_p", "top_k", "seed", "max_prompt_length", "data_type"),
        *("eos_tokens", "return_logprobs"),
    }
)
"""Settings of a RolloutConfig that are heeded; `kv_cache_size` is for Tunix's own engine alone, and others must not be set."""


class LLMRollout(BaseRollout):
    """Generates and scores with an `LLM` for a trainer of Tunix.

    Args:
        llm: has the actor's architecture, and `max_model_len` for prompts and answers. Make it with `weights="dense"`.
        rollout_actor: gives the first weights; None if the LLM has them.
        tokenizer: Tunix's, or one that its `TokenizerAdapter` takes.
        rollout_config: is checked now, not when the first prompt comes.
        names: the table of `from_tree` for the weights of the actor; None takes the one for its class.
        mesh: is not used: weights are brought to where the LLM is.

    Raises:
        UserError: the configuration has settings that are not supported here, or there is no table for the actor.
        ModelError: the actor's weights are not those of the LLM's architecture.
    """

    def __init__(
        self,
        *,
        llm: LLM,
        tokenizer: Any,
        rollout_actor: nnx.Module | None = None,
        rollout_config: RolloutConfig | None = None,
        names: Names | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        self.llm = llm
        self._config, self._dtype = llm.model.config, llm.model.dtype
        self._tokenizer = tokenizer if isinstance(tokenizer, TokenizerAdapter) else TokenizerAdapter(tokenizer)
        self._names = names
        if rollout_config is not None:
            self._params(rollout_config)
        if rollout_actor is not None:
            self._names = names if names is not None else _table(rollout_actor)
            self.update_params(nnx.state(rollout_actor))

    def generate(self, prompts: list[str], rollout_config: RolloutConfig, **kwargs: Any) -> RolloutOutput:
        """Continues each prompt once.

        Rows of one call draw with different seeds, so equal prompts get different answers; with `seed` set, equal calls get equal
        answers. A token that ends an answer is kept in `tokens` and left out of `text`. There are no `logits`.

        Raises:
            UserError: a setting is not supported, or a prompt with its answer does not fit the context.
        """
        if kwargs:
            raise UserError(f"{', '.join(kwargs)}: not supported here")
        params = self._params(rollout_config)
        asked = [self._encoded(prompt) for prompt in prompts]
        longest = max(map(len, asked), default=0)
        self._check_length(longest, rollout_config.max_tokens_to_generate)
        seeds = _seeds(rollout_config.seed, len(asked))
        found = self.llm.rollout(asked, [_with_seed(params, seed) for seed in seeds], progress=False)
        drawn = [slice(begin, end) for begin, end in zip(found.prompt_lengths, found.lengths, strict=True)]
        tokens = [row[part] for row, part in zip(found.token_ids, drawn, strict=True)]
        texts = [
            ids[:-1] if reason == "stop" else ids for ids, reason in zip(tokens, found.finish_reasons, strict=True)
        ]
        width = rollout_config.max_prompt_length
        if width is None or width < longest:  # as Tunix's engines do, which cut no prompt either
            width = 1 << (longest - 1).bit_length()
        padded = np.full((len(asked), width), self.pad_id(), np.int32)
        for row, ids in zip(padded, asked, strict=True):
            row[width - len(ids) :] = ids
        logprobs = [row[part] for row, part in zip(found.logprobs, drawn, strict=True)]
        return RolloutOutput(
            text=[self._tokenizer.decode(ids.tolist()) for ids in texts],
            logits=None,
            tokens=tokens,
            left_padded_prompt_tokens=padded,
            logprobs=logprobs if rollout_config.return_logprobs else None,
        )

    def get_per_token_logps(self, prompt_tokens: jax.Array, completion_tokens: jax.Array) -> jax.Array:
        """Returns Float32[B, C], the model's log-probabilities at temperature 1 of completions; 0 for the padding behind them.

        Args:
            prompt_tokens: Int[B, P], padded on the left.
            completion_tokens: Int[B, C], padded on the right.

        Raises:
            RequestError: a row does not fit the context.
        """
        prompts, completions = np.asarray(prompt_tokens), np.asarray(completion_tokens)
        asked, starts, ends = [], [], []
        for prompt, completion in zip(prompts, completions, strict=True):
            first = int(np.argmax(prompt != self.pad_id()))
            real = np.flatnonzero(completion != self.pad_id())
            ends.append(int(real[-1]) + 1 if len(real) else 0)
            starts.append(len(prompt) - first)
            asked.append([*prompt[first:].tolist(), *completion[: ends[-1]].tolist()])
        found = self.llm.score_tokens(asked, starts)
        logps = np.zeros(completions.shape, np.float32)
        for row, scores, start, end in zip(logps, found.logprobs, starts, ends, strict=True):
            row[:end] = scores[start : start + end]
        return jnp.asarray(logps)

    def update_params(self, params: Any, filter_types: tuple[Any, ...] | None = None) -> None:
        """Goes on with the weights of a state of the actor; requests that run are computed to their end first.

        Raises:
            UserError: the weights are those of LoRA adapters.
            ModelError: they are not those of the LLM's architecture.
        """
        lora = filter_types is not None and nnx.LoRAParam in filter_types
        if lora or (isinstance(params, nnx.State) and len(nnx.filter_state(params, nnx.LoRAParam))):
            raise UserError("LoRA adapters are not supported here: train all weights, or merge the adapters first")
        if self._names is None:
            raise UserError("names: without a rollout_actor, say by which table the weights are to be read")
        with jax.transfer_guard("allow"):  # Tunix forbids transfers meanwhile, and where arrays go is decided here
            # The trainer goes on to donate its arrays, so none is taken by reference.
            self.llm.update_weights(from_tree(params, self._names, self._config), copy=True)

    def pad_id(self) -> int:
        """Returns the id of padding."""
        return self._tokenizer.pad_id()

    def eos_id(self) -> int:
        """Returns the id that ends a text."""
        return self._tokenizer.eos_id()

    def model(self) -> None:
        """Returns None: there is no NNX module, and so Tunix knows that it must bring weights."""

    def _encoded(self, prompt: str) -> list[int]:
        """Returns the ids that Tunix's engines make of a prompt."""
        bos = [self._tokenizer.bos_id()] if self._tokenizer.bos_id() else []
        return self._tokenizer.dedup_bos_ids([*bos, *self._tokenizer.encode(prompt)])

    def _params(self, config: RolloutConfig) -> SamplingParams:
        """Returns the parameters that a configuration asks for, but for the seed.

        Raises:
            UserError: it asks for something that is not supported, or does not fit the LLM.
        """
        ours = FOLLOWED | {"kv_cache_size"}
        if others := [each.name for each in fields(config) if each.name not in ours and _is_set(config, each)]:
            raise UserError(f"{', '.join(others)}: settings of other engines; make the LLM as it is to be")
        dtype = self._dtype
        if config.data_type is not None and jnp.dtype(config.data_type) != dtype:
            raise UserError(f"data_type={jnp.dtype(config.data_type)}: the LLM has {dtype}; make it with that dtype")
        mode = self.llm.engine.config.logprobs_mode
        if config.return_logprobs and config.temperature not in (0.0, 1.0) and mode == "raw_logprobs":
            raise UserError(
                f"return_logprobs with temperature={config.temperature}: Tunix expects those of the draw, so make the LLM with "
                "logprobs_mode='processed_logprobs'"
            )
        self._check_length(config.max_prompt_length or 1, config.max_tokens_to_generate)
        eos = [self.eos_id()] if not config.eos_tokens else config.eos_tokens
        return SamplingParams(
            max_tokens=config.max_tokens_to_generate,
            temperature=float(config.temperature),
            top_p=1.0 if config.top_p is None else float(config.top_p),
            top_k=-1 if config.top_k is None else config.top_k,
            stop_token_ids=tuple(eos),
            ignore_eos=True,  # Tunix's tokens alone end an answer
        )

    def _check_length(self, prompt: int, answer: int) -> None:
        """Refuses prompts whose answers would be cut short by the end of the context."""
        if prompt + answer > (most := self.llm.max_model_len):
            raise RequestError(
                f"{prompt} tokens of a prompt and max_tokens_to_generate={answer} exceed the context of {most}: make the LLM "
                "with a larger max_model_len"
            )


def _table(actor: nnx.Module) -> Names:
    """Finds the table for a model of Tunix."""
    packages = type(actor).__module__.split(".")
    if (table := next((TABLES[package] for package in packages if package in TABLES), None)) is None:
        raise UserError(
            f"there is no table of names for {type(actor).__qualname__}: give one as of from_tree, names={{…}}; there are some "
            f"for {', '.join(TABLES)}"
        )
    return table


def _is_set(config: RolloutConfig, each: Field[Any]) -> bool:
    """Tells whether a setting differs from its default."""
    default = each.default_factory() if each.default_factory is not MISSING else each.default
    return getattr(config, each.name) != default


def _seeds(seed: Any, rows: int) -> Sequence[int | None]:
    """Returns a seed for each row: with the same one, a group's equal prompts would get equal answers.

    Args:
        seed: a number, or a key of JAX in either form, or None.
        rows: how many there are.
    """
    if seed is None:
        return [None] * rows
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        seed = jax.random.key_data(seed)
    words = np.atleast_1d(np.asarray(seed)).astype(np.uint64).tolist()
    return np.random.SeedSequence(words).generate_state(rows, np.uint64).tolist()


def _with_seed(params: SamplingParams, seed: int | None) -> SamplingParams:
    return params if seed is None else replace(params, seed=seed)
