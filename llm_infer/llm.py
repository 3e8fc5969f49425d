"""Offline use in one class: `LLM(model).generate(prompts, SamplingParams(...))`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llm_infer.base.errors import RequestError, UserError
from llm_infer.base.outputs import EmbeddingOutput, RequestOutput, ScoreOutput, StreamChunk
from llm_infer.base.progress import Progress
from llm_infer.base.rollout import Rollout, TokenScores
from llm_infer.base.settings import Takes, by_name, document
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.frontend.prompts import (
    Messages,
    Prompt,
    conversations,
    one_or_many,
    one_prompt,
    per_prompt,
    require_streamable,
)
from llm_infer.frontend.rollouts import check_length, for_rollout, rollout_of, scores_of, starts_of
from llm_infer.frontend.scoring import FOR_EMBEDDINGS, FOR_SCORES, POOLINGS, embedding_of, pairs_to_score, score_of
from llm_infer.frontend.session import Session
from llm_infer.models.load import LoadedModel
from llm_infer.models.new_weights import NewWeights, weights_digest, with_weights
from llm_infer.options import EngineOptions, settings
from llm_infer.quant.stored import plain_array
from llm_infer.starting import OF_MODEL, Started, start, start_with
from llm_infer.text.chat_prompt import chat_ids
from llm_infer.text.tokenizer import Tokenizer


class LLM:
    """A model with its tokenizer and an engine.

    Args:
        SETTINGS

    Raises:
        UserError: a setting is unknown or does not fit, or the model cannot be found or loaded; the message says which. Or
            this process is not the first of several: `llm_infer.follow` is for those.
    """

    @Takes(EngineOptions)
    def __init__(self, options: EngineOptions) -> None:
        self._begin(start(options))

    def _begin(self, started: Started) -> None:
        self.tokenizer, self.engine, self._progress = started
        self._session = Session(self.engine, self.tokenizer, self._progress)
        self._updating = threading.RLock()

    @classmethod
    def from_model(cls, model: LoadedModel, *, tokenizer: Tokenizer | None = None, **settings: Any) -> LLM:
        """Makes an LLM of a model that is loaded already (`load_model`), on the devices where it is; nothing is copied.

        Args:
            model: the model.
            tokenizer: takes the place of the model's; with neither, prompts are token ids and results have no text.
            settings: as of `LLM`, but for those that the model decides, such as `dtype` and `tensor_parallel_size`.

        Raises:
            UserError: a setting is unknown, does not fit, or is decided by the model.
        """
        settings = by_name(EngineOptions, settings)
        if decided := sorted(settings.keys() & OF_MODEL):
            raise UserError(f"{', '.join(decided)}: the model has decided that when it was loaded (load_model)")
        made = cls.__new__(cls)
        made._begin(start_with(model, EngineOptions(**settings), tokenizer))
        return made

    @classmethod
    def of(cls, options: EngineOptions) -> LLM:
        """Makes an LLM from options that are there already."""
        return cls(**{name: getattr(options, name) for name in settings()})

    def warm_up(
        self,
        token_counts: Sequence[int] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] = (),
    ) -> None:
        """Compiles step programs now; a program that is missing is compiled when it is first needed.

        Args:
            token_counts: for steps of these token counts (prompt lengths, batch sizes); None compiles all.
            sampling_params: also for requests with these parameters side by side, beyond drawing and stopping.
        """
        self._session.warm_up(token_counts, per_prompt(sampling_params, None))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
        cache_salt: str | None = None,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Continues raw prompts (no chat template), all in one continuous batch.

        Args:
            prompts: one prompt or several: texts, lists of token ids, or dictionaries such as `{"prompt": "…"}` and
                `{"prompt_token_ids": […]}`, each with a `cache_salt` if it needs one.
            sampling_params: one for all or one per prompt.
            priority: one for all or one per prompt, smaller first, where the LLM was made with `policy="priority"`.
            cache_salt: only requests with the same one share cached pages; a prompt's own goes before it.
            progress: show a progress bar; by default as the LLM was made.

        Returns:
            One result per prompt, in order.

        Raises:
            RequestError: a prompt or a parameter is not acceptable; nothing has run then.
        """
        many = one_or_many(prompts)
        shown = self._progress if progress is None else Progress(enabled=progress)
        asked = self._session.prompts.read(
            many, per_prompt(sampling_params, len(many)), priority=priority, cache_salt=cache_salt
        )
        return [one.result() for one in self._session.run(asked, shown)]

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Returns the most likely continuations by beam search: `beam_width` outputs per prompt, ordered by `score`.

        Same as `generate` with parameters that have a `beam_width`; other requests may run beside it.

        Raises:
            RequestError: parameters without `beam_width`, and as `generate`.
        """
        each = per_prompt(params, len(one_or_many(prompts)))
        if any(one.beam_width is None for one in each):
            raise RequestError(
                "beam_search needs parameters with a beam_width: SamplingParams(beam_width=4, max_tokens=64)"
            )
        return self.generate(prompts, each, progress=progress)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Iterator[StreamChunk]:
        """Continues one raw prompt and yields text as it comes; closing the iterator aborts the request before the next step.

        Several streams may be read in turn: all of them advance together.
        """
        prompt, params = one_prompt(prompt), per_prompt(sampling_params, 1)
        require_streamable(params[0])
        asked = self._session.prompts.read([prompt], params, priority=priority, cache_salt=cache_salt)
        with self._session.submitted(asked) as (one,):
            while one.chunks or not one.finished:
                if not one.chunks:
                    self._session.step()
                while one.chunks:
                    yield one.chunks.popleft()
            yield from one.ended_without_token()

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int | Sequence[int] | None = None,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, through the model's chat template.

        Arguments are those of `chat_prompt`, which makes the prompts, and of `generate`, which runs them.
        """
        how: dict[str, Any] = dict(tools=tools, chat_template=chat_template, chat_template_kwargs=chat_template_kwargs)
        how |= dict(add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message)
        prompts = [self.chat_prompt(each, **how) for each in conversations(messages)]
        return self.generate(prompts, sampling_params, priority=priority, cache_salt=cache_salt)

    def stream_chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        **prompt: Any,
    ) -> Iterator[StreamChunk]:
        """Answers one conversation and yields text as it comes; `prompt` are further arguments of `chat_prompt`."""
        ids = self.chat_prompt(messages, **prompt)
        return self.stream(ids, sampling_params, priority=priority, cache_salt=cache_salt)

    def chat_prompt(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Returns the token ids of a conversation in the model's chat format, up to where the answer starts.

        See `text.chat_prompt.chat_ids` for what keeps users from writing control tokens.

        Args:
            messages: each with a `role` and a `content`.
            tools: functions that the model may call; its template for tools is then taken, if it has one.
            add_generation_prompt: end with the header of an answer.
            continue_final_message: end within the last message, which the answer continues; needs
                `add_generation_prompt=False`.
            chat_template: Jinja source, or the name of one of the model's templates.
            chat_template_kwargs: further variables of the template, such as `{"enable_thinking": False}`.

        Raises:
            RequestError: the model has no chat template, or the messages do not fit it.
        """
        if not messages:
            raise RequestError("the conversation is empty: expected at least one message")
        return chat_ids(
            self.tokenizer,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template=chat_template,
            variables=chat_template_kwargs,
        )

    def update_weights(
        self,
        weights: NewWeights,
        version: str | None = None,
        *,
        running: str = "wait",
        copy: bool = False,
        draft: NewWeights | None = None,
    ) -> None:
        """Goes on with other weights, without compiling anything; cached prefixes are forgotten.

        Names are those of `llm.params`, or Hugging Face's (`model.layers.0.self_attn.q_proj.weight`); what is not given
        stays. Arrays of JAX that have the type, shape and sharding of those before are taken by reference. Matrices that are
        kept in blocks are rounded into such blocks again, of the types that can be made; `LLM(weights="dense")` keeps plain
        numbers.

        Args:
            weights: arrays by name, in nested dictionaries or not, or pairs of both.
            version: a name for these weights, which results carry (`RequestOutput.weights_versions`); None counts.
            running: "wait" computes requests that run to their end first, "abort" ends them, "keep" has them go on with the
                new weights and the keys and values that they have.
            copy: take no array by reference, because a jitted function is going to be given them to donate.
            draft: weights of the draft model, which stays as it is without; what it proposes changes no answer.

        Raises:
            ModelError: names that the model does not have, missing tensors, other shapes, or arrays that were deleted; the
                engine goes on with the weights that it has.
            UserError: there are several hosts, `running` is none of these, or there is no draft model.
        """
        _check_one_of("running", running, "wait", "abort", "keep")
        proposing = self.engine.draft_runner
        if draft is not None and proposing is None:
            raise UserError("draft: this LLM has no draft model (speculative_config)")
        if version is not None and not (isinstance(version, str) and version):
            raise UserError(f"version={version!r:.60}: expected a text that is not empty")
        with self._updating:  # what one update leaves as it is must be what the one before made
            model = with_weights(self.engine.runner.model, weights, copy=copy)
            other = None
            if draft is not None and proposing is not None:
                other = with_weights(proposing.model, draft, copy=copy)
            self._session.set_weights(model, version, running, other)

    def sleep(self, level: str = "pages", *, running: str = "wait") -> None:
        """Gives back memory until `wake`, for a trainer on the same devices; nothing can be asked meanwhile.

        Compiled programs stay. Arrays that `update_weights` took by reference stay with whoever else has them. A draft
        model keeps its weights.

        Args:
            level: "pages" gives back the pages of keys and values, "weights" the weights too: then `update_weights` must be
                given all of them before `wake`.
            running: "wait" computes requests that run to their end first, "abort" ends them.

        Raises:
            UserError: an argument is none of these, or there are several hosts.
        """
        _check_one_of("level", level, "pages", "weights")
        _check_one_of("running", running, "wait", "abort")
        self._session.quietly(lambda: self.engine.sleep(weights=level == "weights"), running)

    def wake(self) -> None:
        """Makes empty pages again after `sleep`.

        Raises:
            UserError: weights that were given up are not set since; the message names them.
        """
        self._session.quietly(self.engine.wake, "keep")

    @property
    def model(self) -> LoadedModel:
        """The model with the weights that the engine has: what `from_model` takes."""
        return replace(self.engine.runner.model, params=self.params, tokenizer=self.tokenizer)

    @property
    def max_model_len(self) -> int:
        """The longest sequence in tokens, prompt and answer together."""
        return self.engine.max_model_len

    @property
    def params(self) -> dict[str, Any]:
        """The weights that the engine has, by name: arrays, or matrices in blocks (`StoredWeights`). Not to be donated."""
        return {name: plain_array(value) for name, value in self.engine.runner.model.params.items()}

    @property
    def weights_version(self) -> str:
        """The name of the weights; "update-0" until they are changed."""
        return self.engine.weights_version

    def weights_digest(self) -> str:
        """Returns a checksum of all weights, in hexadecimal: equal between LLMs of the same settings with the same weights."""
        return weights_digest(self.engine.runner.model.params)

    def get_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer, which is `tokenizer`, too."""
        return self.tokenizer

    def score(self, contexts: Sequence[str], continuations: Sequence[str]) -> list[ScoreOutput]:
        """Returns the log-likelihood of each continuation given its context, as evaluation harnesses ask for it.

        White space at the end of a context counts to the continuation, and where a token crosses the border all of it:
        see `text.continuations.continuation_tokens`; `ScoreOutput.text` is what was scored.

        Raises:
            RequestError: something else than lists of texts, the lists differ in length, or a continuation has no token or
                does not fit the context.
        """
        pairs = pairs_to_score(self.tokenizer, contexts, continuations)
        asked = self._session.prompts.read([ids for ids, _ in pairs], [FOR_SCORES] * len(pairs), prompt_only=True)
        found = zip(self._session.run(asked, self._progress), pairs, strict=True)
        return [score_of(tracked, self.tokenizer, start) for tracked, (_, start) in found]

    def rollout(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        pad_to: int | None = None,
        priority: int | Sequence[int] | None = None,
        cache_salt: str | None = None,
        progress: bool | None = None,
    ) -> Rollout:
        """Continues prompts as `generate` does, and returns tokens, masks and log-probabilities as arrays of one shape.

        Args:
            prompts, sampling_params, priority, cache_salt, progress: as of `generate`.
            pad_to: tokens in a row; by default the next power of two, so that a jitted training step sees few shapes.

        Raises:
            RequestError: as `generate`, a row may get more tokens than `pad_to`, or a request failed.
        """
        many = one_or_many(prompts)
        shown = self._progress if progress is None else Progress(enabled=progress)
        params = [for_rollout(each) for each in per_prompt(sampling_params, len(many))]
        asked = self._session.prompts.read(many, params, priority=priority, cache_salt=cache_salt)
        if pad_to is not None:
            check_length(asked, self.engine.max_model_len, pad_to)
        return rollout_of([one.result() for one in self._session.run(asked, shown)], asked, pad_to)

    def score_tokens(
        self,
        token_ids: Sequence[Sequence[int]],
        start: int | Sequence[int] = 0,
        *,
        top_logprobs: int = 0,
        pad_to: int | None = None,
    ) -> TokenScores:
        """Returns the log-probability of each token given those before it, as arrays of one shape.

        Args:
            token_ids: sequences.
            start: the first token to score, one for all or one for each; a very first token has no score.
            top_logprobs: how many of the most likely tokens to return in each place.
            pad_to: tokens in a row; by default the next power of two.

        Raises:
            RequestError: an argument is not acceptable, or a request failed.
        """
        rows = one_or_many(token_ids)
        params = [SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=top_logprobs)] * len(rows)
        asked = self._session.prompts.read(rows, params, prompt_only=True)
        starts = starts_of(start, [one.ids for one in asked])
        results = [one.result() for one in self._session.run(asked, self._progress)]
        return scores_of(results, starts, top_logprobs, pad_to)

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, pooling: str = "mean", normalize: bool = True
    ) -> list[EmbeddingOutput]:
        """Returns a vector for each text, made of the hidden states after the final norm.

        Args:
            prompts: one text or several, or token ids.
            pooling: "mean" over all tokens, or "last".
            normalize: scale to length 1.

        Raises:
            RequestError: a prompt is not acceptable, or `pooling` is neither.
        """
        if pooling not in POOLINGS:
            raise RequestError(f"pooling={pooling!r}: expected 'mean' or 'last'")
        many = one_or_many(prompts)
        asked = self._session.prompts.read(many, [FOR_EMBEDDINGS] * len(many), pooled=True)
        return [embedding_of(one, pooling, normalize) for one in self._session.run(asked, Progress.silent())]


def _check_one_of(name: str, value: object, *allowed: str) -> None:
    if value not in allowed:
        raise UserError(f"{name}={value!r:.60}: expected {' or '.join(map(repr, allowed))}")


document(LLM, EngineOptions)
