"""Offline use in one class: `LLM(model).generate(prompts, SamplingParams(...))`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_infer.config import CacheConfig, EngineConfig, SchedulerConfig
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.compile_cache import enable_compile_cache
from llm_infer.engine.engine import Engine
from llm_infer.errors import ModelError, RequestError, UserError
from llm_infer.models.load import LoadedModel, dummy_model, dummy_source, load_model, save_model
from llm_infer.models.registry import family
from llm_infer.outputs import CompletionOutput, RequestMetrics, RequestOutput, StreamChunk
from llm_infer.scheduler.request import Request, TokenEvent
from llm_infer.text.byte_tokenizer import byte_tokenizer
from llm_infer.text.chat_template import apply_chat_template
from llm_infer.text.detokenizer import IncrementalDetokenizer
from llm_infer.text.tokenizer import Tokenizer
from llm_infer.weights.checkpoint_writer import checked_destination
from llm_infer.weights.default_model import DEFAULT_MODEL
from llm_infer.weights.orbax_checkpoint import DTYPES
from llm_infer.weights.progress import Progress
from llm_infer.weights.sources import OpenModel, open_model, resolve, tokenizer_files

Prompt = str | Sequence[int]
"""Text, or token ids."""

LOAD_FORMATS = ("auto", "dummy")

Messages = Sequence[Mapping[str, Any]]
"""A conversation in OpenAI form: `[{"role": "user", "content": "…"}, …]`."""


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
        kv_cache_memory: bytes of the page pool; None takes the platform's default.
        enable_prefix_caching: share pages of equal prompt beginnings.
        policy: order of waiting requests, "fcfs" or "priority".
        seed: seeds requests without a seed of their own.
        fused_qkv: store query, key and value projections as one matrix.
        overlap: prepare the next step on the host while the device runs one.
        load_format: "auto" reads the model's weights; "dummy" makes random ones on the device, for a published
            architecture (see `llm-infer models`) or a directory with a config.json.
        progress: show progress bars on stderr.

    Raises:
        UserError: the model cannot be found or loaded, or a setting does not fit; the message says which.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL.name,
        *,
        max_model_len: int | None = None,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        page_size: int = 16,
        num_pages: int | None = None,
        kv_cache_memory: int | None = None,
        enable_prefix_caching: bool = True,
        policy: str = "fcfs",
        seed: int = 0,
        fused_qkv: bool = True,
        overlap: bool = True,
        check_every_step: bool = False,
        load_format: str = "auto",
        progress: bool = True,
    ) -> None:
        if load_format not in LOAD_FORMATS:
            raise UserError(f"load_format={load_format!r}: expected one of {', '.join(LOAD_FORMATS)}")
        config = EngineConfig(
            cache=CacheConfig(page_size, num_pages, kv_cache_memory, enable_prefix_caching),
            scheduler=SchedulerConfig(max_num_seqs, max_num_batched_tokens, max_model_len, policy),
            seed=seed,
            overlap=overlap,
            check_every_step=check_every_step,
            fused_qkv=fused_qkv,
        )
        enable_compile_cache()
        self._progress = Progress(enabled=progress)
        if load_format == "dummy":
            self.tokenizer, loaded = _dummy(model, fused_qkv)
        else:
            opened = open_model(resolve(model, progress=self._progress))
            family(opened.config)  # an unknown architecture is the first thing to hear of
            self.tokenizer = _tokenizer(opened)
            loaded = load_model(opened, fused_qkv=fused_qkv, progress=self._progress)
            opened.tensors.close()
        self.engine = Engine(loaded, config, self.tokenizer.eos_token_ids)

    def warm_up(self, token_counts: Sequence[int] | None = None) -> None:
        """Compiles step programs now; a program that is missing is compiled when it is first needed.

        Args:
            token_counts: for steps of these token counts (prompt lengths, batch sizes); None compiles all.
        """
        total = len(token_counts or self.engine.runner.buckets)
        with self._progress.task("Compiling step programs", total=total) as bar:
            for _ in self.engine.warm_up(token_counts):
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
        params = _per_prompt(sampling_params, len(many))
        with self._requests(many, params) as running:
            shown = self._progress if progress is None else Progress(enabled=progress)
            with shown.task("Generating", total=len(many)) as bar:
                while running.unfinished:
                    for request in running.take(self.engine.step()):
                        bar.advance(request.finished)
            return [running.output(request) for request in running.requests]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """Continues one raw prompt and yields text as it comes; closing the iterator aborts the request."""
        with self._requests([prompt], [sampling_params or SamplingParams()]) as running:
            while running.unfinished:
                yield from running.chunks(self.engine.step())

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, through the model's chat template."""
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = messages if several else [messages]
        return self.generate([self.chat_prompt(m, tools=tools) for m in conversations], sampling_params)

    def stream_chat(self, messages: Messages, sampling_params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """Answers one conversation and yields text as it comes."""
        return self.stream(self.chat_prompt(messages), sampling_params)

    def chat_prompt(self, messages: Messages, *, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Token ids of a conversation in the model's chat format, up to where the answer starts.

        Raises:
            RequestError: the model has no chat template, or the messages do not fit it.
        """
        tokenizer = self.tokenizer
        if tokenizer.chat_template is None:
            raise RequestError("this model has no chat template: use raw prompts (LLM.generate, or --raw)")
        bos, eos = (
            None if i is None else tokenizer.decode([i], skip_special_tokens=False)
            for i in (tokenizer.bos_token_id, tokenizer.eos_token_id)
        )
        text = apply_chat_template(tokenizer.chat_template, messages, tools=tools, bos_token=bos, eos_token=eos)
        return tokenizer.encode(text, add_special_tokens=False)

    def _requests(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> _Running:
        ids = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        return _Running(self, prompts, ids, params)


def convert(source: str, destination: str | Path, *, dtype: str = "float32", progress: Progress | None = None) -> Path:
    """Writes a model as a checkpoint of stacked, fused parameters that loads without any conversion.

    Args:
        source: a model as for `LLM`.
        destination: a directory that does not exist or is empty.
        dtype: "float32", or "bfloat16" for half the size; a model that runs in another type is converted when it loads.
        progress: reports what is read and written; None is silent.

    Returns:
        The absolute path of the checkpoint.

    Raises:
        ModelError: the source cannot be loaded, or the destination is in use or cannot be written.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    path = checked_destination(destination)
    opened = open_model(resolve(source, progress=progress))
    _tokenizer(opened)  # a model whose tokenizer is not supported fails here, not after minutes of writing
    files = tokenizer_files(opened)
    model = load_model(opened, dtype=DTYPES[dtype], progress=progress)
    opened.tensors.close()
    save_model(model, path, files, progress=progress)
    return path


def _dummy(name: str, fused_qkv: bool) -> tuple[Tokenizer, LoadedModel]:
    """A model of random weights, with the tokenizer of its directory where there is one."""
    values, directory = dummy_source(name)
    config = family(values).config(values, fused_qkv=fused_qkv)
    if directory is not None and (directory / "tokenizer.json").is_file():
        return Tokenizer.from_hf_directory(directory), dummy_model(config)
    return byte_tokenizer(config.vocab_size), dummy_model(config)


def _tokenizer(opened: OpenModel) -> Tokenizer:
    metadata = opened.tokenizer_metadata
    if metadata is not None:
        return Tokenizer.from_gguf(metadata)
    return Tokenizer.from_hf_directory(opened.tokenizer_directory)


class _Running:
    """Requests on their way through the engine, with the text of each sample; leaving the context aborts the rest."""

    def __init__(
        self, llm: LLM, prompts: Sequence[Prompt], ids: Sequence[list[int]], params: Sequence[SamplingParams]
    ) -> None:
        self._llm, self._prompts = llm, {}
        self.requests: list[Request] = []
        try:
            for prompt, prompt_ids, param in zip(prompts, ids, params, strict=True):
                request = llm.engine.add_request(prompt_ids, param)
                self.requests.append(request)
                self._prompts[request.request_id] = prompt if isinstance(prompt, str) else None
        except BaseException:
            self.__exit__()
            raise
        self._texts = {r.request_id: [_Sample(llm, i) for i in range(r.n)] for r in self.requests}
        self.unfinished = {r.request_id for r in self.requests}

    def __enter__(self) -> _Running:
        return self

    def __exit__(self, *_: object) -> None:
        for request in self.requests:
            if not request.finished:
                self._llm.engine.abort(request.request_id)

    def chunks(self, events: Iterable[TokenEvent]) -> Iterator[StreamChunk]:
        """Adds events to their samples; yields what each made visible."""
        for event in events:
            request = event.sequence.request
            if request.request_id in self._texts:
                chunk = self._texts[request.request_id][event.sequence.sample_index].push(event)
                if request.finished:
                    self.unfinished.discard(request.request_id)
                yield chunk

    def take(self, events: Iterable[TokenEvent]) -> Iterator[Request]:
        """Adds events to their samples; yields the requests that finished with them."""
        events = list(events)
        for event, _ in zip(events, self.chunks(events), strict=False):
            if event.finish_reason is not None and event.sequence.request.finished:
                yield event.sequence.request

    def output(self, request: Request) -> RequestOutput:
        """The result of a request."""
        metrics = None
        if request.finish_time is not None and request.first_token_time is not None:
            start = request.arrival_time or 0.0
            metrics = RequestMetrics(
                queue=(request.first_scheduled_time or start) - start,
                time_to_first_token=request.first_token_time - start,
                total=request.finish_time - start,
                num_preemptions=request.num_preemptions,
            )
        return RequestOutput(
            request_id=request.request_id,
            prompt=self._prompts[request.request_id],
            prompt_token_ids=list(request.prompt),
            outputs=[sample.output for sample in self._texts[request.request_id]],
            num_cached_tokens=request.num_cached_tokens,
            metrics=metrics,
        )


class _Sample:
    """One sample's output and the detokenizer that extends its text."""

    def __init__(self, llm: LLM, index: int) -> None:
        self.output = CompletionOutput(index)
        self._detokenizer = IncrementalDetokenizer(llm.tokenizer)

    def push(self, event: TokenEvent) -> StreamChunk:
        text = self._detokenizer.push([event.token_id])
        if event.finish_reason is not None:
            text += self._detokenizer.finish()
        self.output.text += text
        self.output.token_ids.append(event.token_id)
        self.output.finish_reason = event.finish_reason
        return StreamChunk(self.output.index, text, [event.token_id], event.finish_reason)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _per_prompt(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling parameters for {count} prompts: give one, or one per prompt")
    return list(params)
