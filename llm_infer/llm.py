"""Offline use in one class: `LLM(model).generate(prompts, SamplingParams(...))`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np

from llm_infer.base.errors import RequestError, UserError
from llm_infer.base.forks import refuse_lost_child
from llm_infer.base.outputs import EmbeddingOutput, RequestOutput, ScoreOutput, StreamChunk
from llm_infer.base.plain_values import plain_list
from llm_infer.base.progress import Progress
from llm_infer.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig, SpeculativeConfig
from llm_infer.decoding.features import PLAIN, features_of, union
from llm_infer.decoding.grammar import CompiledGrammar, GrammarCompiler
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.compile_cache import enable_compile_cache
from llm_infer.engine.engine import Engine
from llm_infer.engine.results import PooledPrompt
from llm_infer.engine.warm_up import WarmUp
from llm_infer.frontend.session import Asked, Session
from llm_infer.frontend.tracking import TrackedRequest
from llm_infer.loading import load, require_same_tokens
from llm_infer.parallel.channel import Follower, Leader
from llm_infer.parallel.distributed import join
from llm_infer.text.chat_prompt import chat_ids
from llm_infer.text.continuations import continuation_tokens
from llm_infer.text.detokenizer import IncrementalDetokenizer
from llm_infer.weights.default_model import DEFAULT_MODEL

Prompt = str | Sequence[int] | np.ndarray
"""Text, or token ids: a list or an array of integers (of NumPy or another library)."""

Messages = Sequence[Mapping[str, Any]]
"""A conversation in OpenAI form: `[{"role": "user", "content": "…"}, …]`."""


OF_THIS_PROCESS = ("self", "coordinator_address", "num_processes", "process_id", "progress")
"""Arguments of `LLM` that may differ between the processes of several hosts."""


class LLM:
    """A model with its tokenizer and an engine.

    Args:
        model: the default model's name, a GGUF file, a Hugging Face directory, a directory written by `convert`, or a
            hub id such as `org/name`.
        max_model_len: longest sequence in tokens; None takes the model's context length.
        max_num_seqs: sequences that run at the same time.
        max_num_batched_tokens: tokens of one step; longer prompts are prefilled in chunks.
        page_size: tokens in a KV page.
        num_pages: pages of the pool; None sizes it from `kv_cache_memory`.
        kv_cache_memory: bytes of the page pool; None sizes it from `memory_utilization`.
        memory_utilization: share of each device's memory for weights, pages and steps together: the page count follows
            from what the compiler says of the largest step. None is 0.9 on accelerators, and on CPUs a pool of the
            smaller of 1 GiB and a quarter of the memory.
        enable_prefix_caching: share pages of equal prompt beginnings.
        policy: order of waiting requests, "fcfs" or "priority".
        num_scheduler_steps: decode steps that run as one program where nothing needs the host in between; the output is
            the same, a stream gets so many tokens at once.
        seed: seeds requests without a seed of their own.
        fused_qkv: store query, key and value projections as one matrix.
        device: "auto" takes what JAX finds; "cpu", "gpu" or "tpu" refuses to run on anything else.
        dtype: type of weights and activations, a draft model's too: "float32", "bfloat16" or "float16"; "auto" is float32
            on CPUs, where weights then stay as the file has them, and bfloat16 on accelerators.
        precision: "exact" computes in float32 with the file's weights; "fast" also rounds activations to int8 before
            they meet 4-bit weights, and keeps bfloat16 pages, on CPUs with the native kernels.
        kv_cache_dtype: type of keys and values in the pages: "float32", "bfloat16" or "float16"; "auto" follows
            `dtype` and `precision`.
        overlap: prepare the next step on the host while the device runs one.
        speculative_config: propose tokens that one step checks together, for the same output in fewer steps:
            `{"method": "ngram", "num_speculative_tokens": 7, "prompt_lookup_max": 4, "prompt_lookup_min": 2}` proposes
            what followed the last tokens when they occurred before; `{"method": "draft_model", "model": "…",
            "num_speculative_tokens": 4}` proposes what a smaller model with the same tokens draws.
        tensor_parallel_size: devices over which every layer is cut, by heads and MLP columns.
        data_parallel_size: shards of the batch, each on devices and with pages of its own; `max_num_seqs`,
            `max_num_batched_tokens` and `num_pages` are per shard.
        expert_parallel_size: devices over which a mixture's experts are spread.
        coordinator_address, num_processes, process_id: with several hosts, where process 0 listens ("10.0.0.1:8476"), how
            many processes there are and which one this is; all are started with the same command. SLURM and Cloud TPU
            tell by themselves. On all but process 0, this call runs what process 0 runs, and ends the process with it.
        load_format: "auto" reads the model's weights; "dummy" makes random ones on the device, for a published
            architecture (see `llm-infer models`) or a directory with a config.json.
        progress: show progress bars on stderr.

    Raises:
        UserError: the model cannot be found or loaded, or a setting does not fit; the message says which.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = DEFAULT_MODEL.name,
        *,
        max_model_len: int | None = None,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        page_size: int = 16,
        num_pages: int | None = None,
        kv_cache_memory: int | None = None,
        memory_utilization: float | None = None,
        enable_prefix_caching: bool = True,
        policy: str = "fcfs",
        num_scheduler_steps: int = 1,
        seed: int = 0,
        fused_qkv: bool = True,
        device: str = "auto",
        dtype: str = "auto",
        precision: str = "exact",
        kv_cache_dtype: str = "auto",
        overlap: bool = True,
        check_every_step: bool = False,
        speculative_config: Mapping[str, Any] | None = None,
        tensor_parallel_size: int = 1,
        data_parallel_size: int = 1,
        expert_parallel_size: int = 1,
        coordinator_address: str | None = None,
        num_processes: int | None = None,
        process_id: int | None = None,
        load_format: str = "auto",
        progress: bool = True,
    ) -> None:
        settings = {name: str(value) for name, value in locals().items() if name not in OF_THIS_PROCESS}
        pages = kv_cache_dtype if kv_cache_dtype != "auto" else "bfloat16" if precision == "fast" else None
        config = EngineConfig(
            cache=CacheConfig(
                page_size,
                num_pages,
                kv_cache_memory,
                memory_utilization,
                enable_prefix_caching=enable_prefix_caching,
                dtype=pages,
            ),
            scheduler=SchedulerConfig(
                max_num_seqs,
                max_num_batched_tokens,
                max_model_len,
                policy,
                num_scheduler_steps=num_scheduler_steps,
            ),
            seed=seed,
            overlap=overlap,
            check_every_step=check_every_step,
            fused_qkv=fused_qkv,
            speculative=None if speculative_config is None else SpeculativeConfig.of(speculative_config),
        )
        refuse_lost_child()
        parallel = ParallelConfig(tensor_parallel_size, data_parallel_size, expert_parallel_size)
        channel = join(coordinator_address, num_processes, process_id, settings)
        _require_device(device)
        self._progress = Progress(enabled=progress and not isinstance(channel, Follower))
        if note := enable_compile_cache():
            self._progress.note(note)
        load_one = partial(
            load,
            load_format=load_format,
            fused_qkv=fused_qkv,
            dtype=dtype,
            precision=precision,
            progress=self._progress,
            parallel=parallel,
        )
        self.tokenizer, loaded = load_one(model, max_model_len=max_model_len)
        draft = None
        if config.speculative is not None and config.speculative.model is not None:
            name = config.speculative.model
            try:
                tokenizer, draft = load_one(name)
            except UserError as error:  # it need not be cut like the model
                raise UserError(f"the draft model {name!r}: {error}") from error
            require_same_tokens(self.tokenizer, tokenizer, name)
        self.engine = Engine(loaded, config, self.tokenizer.eos_token_ids, draft_model=draft, channel=channel)
        if isinstance(channel, Leader):
            channel.watch()
        elif channel is not None:
            self.engine.follow()
            raise SystemExit(0)
        self._session = Session(self.engine, self.tokenizer)
        self._grammars: GrammarCompiler | None = None  # made by the first request that needs it
        self._grammar_lock = threading.RLock()

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
        params = _per_prompt(sampling_params, None)
        counts = plain_list(token_counts)
        if counts is not None and not (
            isinstance(counts, list | tuple) and all(type(c) is int and c > 0 for c in counts)
        ):
            raise RequestError(f"token_counts={token_counts!r:.60}: expected whole numbers above 0, or None for all")
        self._compile(self.engine.warm_up(counts, [PLAIN, union(map(features_of, params))]))

    def _compile(self, programs: WarmUp) -> None:
        with self._progress.task(f"Compiling {programs}", total=len(programs)) as bar:
            for _ in programs:
                bar.advance(1)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Continues raw prompts (no chat template), all in one continuous batch.

        Args:
            prompts: one prompt or several; text or token ids.
            sampling_params: one for all or one per prompt.
            progress: show a progress bar; by default as the LLM was made.

        Returns:
            One result per prompt, in order.

        Raises:
            RequestError: a prompt or a parameter is not acceptable; nothing has run then.
        """
        many = _as_list(prompts)
        shown = self._progress if progress is None else Progress(enabled=progress)
        tracked = self._run(many, _per_prompt(sampling_params, len(many)), shown)
        return [one.result() for one in tracked]

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """The most likely continuations by beam search: `beam_width` outputs per prompt, ordered by `score`.

        Same as `generate` with parameters that have a `beam_width`; other requests may run beside it.

        Raises:
            RequestError: parameters without `beam_width`, and as `generate`.
        """
        each = _per_prompt(params, len(_as_list(prompts)))
        if any(one.beam_width is None for one in each):
            raise RequestError(
                "beam_search needs parameters with a beam_width: SamplingParams(beam_width=4, max_tokens=64)"
            )
        return self.generate(prompts, each, progress=progress)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """Continues one raw prompt and yields text as it comes; closing the iterator aborts the request before the next step.

        Several streams may be read in turn: all of them advance together.
        """
        prompt, params = _as_prompt(prompt), _per_prompt(sampling_params, 1)
        if params[0].num_sequences > params[0].n:
            name = "best_of" if params[0].beam_width is None else "beam_width"
            raise RequestError(f"{name}={getattr(params[0], name)} cannot stream: the best is known at the end only")
        with self._track([prompt], params) as (one,):
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
    ) -> list[RequestOutput]:
        """Answers one conversation or several, through the model's chat template."""
        if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
            raise RequestError(f"expected a list of messages with role and content, found {messages!r:.60}")
        several = not isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = messages if several else [messages]
        return self.generate([self.chat_prompt(m, tools=tools) for m in conversations], sampling_params)

    def stream_chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Iterator[StreamChunk]:
        """Answers one conversation and yields text as it comes."""
        return self.stream(self.chat_prompt(messages, tools=tools), sampling_params)

    def chat_prompt(self, messages: Messages, *, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Token ids of a conversation in the model's chat format, up to where the answer starts.

        With `tools` the model's template for tools is taken, if it has one. See `text.chat_prompt.chat_ids` for what
        keeps users from writing control tokens.

        Raises:
            RequestError: the model has no chat template, or the messages do not fit it.
        """
        if not messages:
            raise RequestError("the conversation is empty: expected at least one message")
        return chat_ids(self.tokenizer, messages, tools=tools)

    def score(self, contexts: Sequence[str], continuations: Sequence[str]) -> list[ScoreOutput]:
        """Log-likelihood of each continuation given its context, as evaluation harnesses ask for it.

        White space at the end of a context counts to the continuation, and where a token crosses the border all of it:
        see `text.continuations.continuation_tokens`; `ScoreOutput.text` is what was scored.

        Raises:
            RequestError: something else than lists of texts, the lists differ in length, or a continuation has no token or
                does not fit the context.
        """
        contexts, continuations = plain_list(contexts), plain_list(continuations)
        for name, texts in (("contexts", contexts), ("continuations", continuations)):
            if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
                raise RequestError(f"score takes a list of texts as {name}, found {texts!r:.60}")
        if len(contexts) != len(continuations):
            raise RequestError(f"{len(contexts)} contexts for {len(continuations)} continuations: give one for each")
        pairs = zip(contexts, continuations, strict=True)
        both = [continuation_tokens(self.tokenizer, context, continuation) for context, continuation in pairs]
        prompts = [ids for ids, _ in both]
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        tracked = self._run(prompts, [params] * len(prompts), self._progress, prompt_only=True)
        results = [one.result() for one in tracked]
        scores = []
        for result, (whole, start) in zip(results, both, strict=True):
            ids = whole[start:]
            _require_success(result)
            assert result.prompt_logprobs is not None
            found = [(at or {})[i] for i, at in zip(ids, result.prompt_logprobs[start:], strict=True)]
            logprobs = [one.logprob for one in found]
            detokenizer = IncrementalDetokenizer(self.tokenizer, prompt=whole[:start], skip_special_tokens=False)
            text = detokenizer.push(ids) + detokenizer.finish()
            scores.append(ScoreOutput(sum(logprobs), ids, logprobs, all(one.rank == 1 for one in found), text))
        return scores

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, pooling: str = "mean", normalize: bool = True
    ) -> list[EmbeddingOutput]:
        """A vector for each text, made of the hidden states after the final norm.

        Args:
            prompts: one text or several, or token ids.
            pooling: "mean" over all tokens, or "last".
            normalize: scale to length 1.

        Raises:
            RequestError: a prompt is not acceptable, or `pooling` is neither.
        """
        if pooling not in ("mean", "last"):
            raise RequestError(f"pooling={pooling!r}: expected 'mean' or 'last'")
        many = _as_list(prompts)
        params = SamplingParams(temperature=0.0, max_tokens=1)
        outputs = []
        for one in self._run(many, [params] * len(many), Progress.silent(), pooled=True):
            _require_success(one.result())
            found = one.request.prompt_results
            assert isinstance(found, PooledPrompt)
            vector = found.last if pooling == "last" else found.total / np.float32(found.count)
            if normalize:
                vector = vector / np.linalg.norm(vector)
            outputs.append(EmbeddingOutput(vector.tolist(), list(one.request.prompt)))
        return outputs

    def _run(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], progress: Progress, **kinds: bool
    ) -> list[TrackedRequest]:
        """Requests for these prompts when they have finished."""
        try:
            with (
                self._track(prompts, params, **kinds) as tracked,
                progress.task("Generating", total=len(prompts)) as bar,
            ):
                while (done := sum(one.finished for one in tracked)) < len(tracked):
                    bar.set(done)
                    self._session.step()
                bar.set(done)
                return tracked
        finally:
            self._session.settle()

    @contextmanager
    def _track(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], **kinds: bool
    ) -> Iterator[list[TrackedRequest]]:
        """Requests for these prompts; those that have not finished on leaving are left."""
        refuse_lost_child()
        prompt_ids = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        # Before the turn: other threads' steps go on while a grammar is compiled.
        grammars = {id(param): self._grammar(param) for param in params}
        words = {id(param): [w for text in param.bad_words for w in self._spellings(text)] for param in params}
        asked = [
            Asked(prompt, ids, param, words[id(param)], grammars[id(param)], **kinds)
            for prompt, ids, param in zip(prompts, prompt_ids, params, strict=True)
        ]
        tracked: list[TrackedRequest] = []
        try:
            self._session.add(tracked, asked, self._prepare)
            yield tracked
        finally:  # of a stream that nobody reads any more Python runs this wherever it likes
            self._session.leave(tracked)

    def _prepare(self, tracked: Sequence[TrackedRequest]) -> None:
        """Compiles what requests need before their first step, side by side, and with a word about it."""
        self._compile(self.engine.warm_up_for([one.request for one in tracked]))

    def _spellings(self, text: str) -> list[list[int]]:
        """Token ids of a text within another, as it is and after a space."""
        texts = {text, text if text.startswith(" ") else f" {text}"}
        return [self.tokenizer.encode(each, add_special_tokens=False, begins=False) for each in sorted(texts)]

    def _grammar(self, params: SamplingParams) -> CompiledGrammar | None:
        if params.structured_outputs is None:
            return None
        with self._grammar_lock:
            if self._grammars is None:
                tokenizer, vocab_size = self.tokenizer, self.engine.vocab_size
                self._grammars = GrammarCompiler(
                    [tokenizer.token_bytes(i) for i in range(vocab_size)],
                    [i for i in range(vocab_size) if tokenizer.is_special(i)],
                    sorted(tokenizer.eos_token_ids),
                    tokenizer.exact_tokens,
                )
        return self._grammars.compile(params.structured_outputs)


DEVICES = ("auto", "cpu", "gpu", "tpu")


def _require_device(device: str) -> None:
    """Raises UserError if JAX has another kind of device: settings made for one waste memory and time of another."""
    if device not in DEVICES:
        raise UserError(f"device={device!r:.60}: expected one of {', '.join(DEVICES)}")
    found = jax.default_backend()
    if device not in ("auto", found):
        raise UserError(
            f"device={device!r}: JAX found {jax.device_count()} × {found} here (llm-infer doctor tells more): take settings "
            f"made for it, or set device to {found!r} to run with these all the same"
        )


def _require_success(result: RequestOutput) -> None:
    """Raises RequestError with what ended a request that has no result."""
    if (error := result.outputs[0].error) is not None:
        raise RequestError(error)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    found = type(prompts).__name__
    prompts = plain_list(prompts)
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence):
        raise RequestError(f"expected a prompt or a list of prompts (text or token ids), found {found}")
    if prompts and isinstance(prompts[0], int | float):
        return [prompts]  # type: ignore[list-item]
    return [_as_prompt(prompt) for prompt in prompts]


def _as_prompt(prompt: Any) -> Prompt:
    """One prompt, with token ids as a list of Python numbers."""
    found = type(prompt).__name__
    prompt = plain_list(prompt)
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        raise RequestError(f"a prompt must be text or token ids, found {found}")
    return prompt


def _per_prompt(params: SamplingParams | Sequence[SamplingParams] | None, count: int | None) -> list[SamplingParams]:
    """One for each of `count` prompts; with None just as many as are given."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * (1 if count is None else count)
    if not isinstance(params, Sequence) or not all(isinstance(param, SamplingParams) for param in params):
        raise RequestError(
            f"sampling_params must be SamplingParams, one for all or one per prompt; found {params!r:.60}"
        )
    if count is not None and len(params) != count:
        raise RequestError(f"{len(params)} sampling parameters for {count} prompts: give one, or one per prompt")
    return list(params)
