"""Requests on their way through the engine, as text: detokenised, cut at stop strings, ranked, with log-probabilities."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from llm_infer.base.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, StreamChunk
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.scheduler.request import Request, TokenEvent, TokenLogprobs
from llm_infer.text.detokenizer import IncrementalDetokenizer
from llm_infer.text.stop_strings import StopStrings
from llm_infer.text.tokenizer import Tokenizer


class TrackedRequest:
    """One request with the text of its samples.

    Attributes:
        request: the engine's request.
        chunks: what a stream has not read yet.
        finished: all its tokens are here. The engine's request may have ended earlier, while they are on their way.
        failure: why nothing more will come, where that is not the engine's word.
    """

    def __init__(self, request: Request, prompt: object, params: SamplingParams, tokenizer: Tokenizer) -> None:
        self.request = request
        self.chunks: deque[StreamChunk] = deque()
        self.finished = False
        self.failure: str | None = None
        self._prompt = prompt if isinstance(prompt, str) else None
        self._params, self._tokenizer = params, tokenizer
        self._samples = [_Sample(tokenizer, index, params, request.prompt) for index in range(request.n)]

    def push(self, event: TokenEvent) -> bool:
        """Takes in a token; True if the sample ends here by a stop string, which the engine does not know."""
        sample = self._samples[event.sequence.sample_index]
        if sample.output.finish_reason is not None:
            return False  # drawn before the engine heard of the stop string
        self.chunks.append(sample.push(event))
        return event.finish_reason is None and sample.output.finish_reason is not None

    def fail(self, why: str) -> None:
        """Ends the samples that have not ended, with the finish reason "error"."""
        self.failure = why
        self.finished = True

    def ended_without_token(self) -> Iterator[StreamChunk]:
        """Yields last chunks of the samples that ended otherwise than by a token, as by an abort."""
        for sample, sequence in zip(self._samples, self.request.sequences, strict=True):
            if sample.output.finish_reason is None:
                failed = self.failure is not None
                reason = "error" if failed else sequence.finish_reason
                yield sample.end(reason, self.failure if failed else sequence.error)

    def result(self) -> RequestOutput:
        """Returns the finished request's result."""
        request, params = self.request, self._params
        for _ in self.ended_without_token():
            pass
        outputs = [sample.output for sample in self._samples]
        if params.beam_width is None and params.num_sequences > params.n:
            outputs.sort(key=lambda output: output.cumulative_logprob or 0.0, reverse=True)
            outputs = outputs[: params.n]
            for index, output in enumerate(outputs):
                output.index = index
        metrics = None
        if request.finish_time is not None and request.first_token_time is not None:
            start = request.arrival_time or 0.0
            metrics = RequestMetrics(
                queue=(request.first_scheduled_time or start) - start,
                time_to_first_token=request.first_token_time - start,
                total=request.finish_time - start,
                num_preemptions=request.num_preemptions,
                num_drafted_tokens=sum(s.speculation.drafted for s in request.sequences if s.speculation),
                num_accepted_tokens=sum(s.speculation.accepted for s in request.sequences if s.speculation),
            )
        return RequestOutput(
            request_id=request.request_id,
            prompt=self._prompt,
            prompt_token_ids=list(request.prompt),
            outputs=outputs,
            num_cached_tokens=request.num_cached_tokens,
            metrics=metrics,
            prompt_logprobs=self._prompt_logprobs(),
            weights_versions=tuple(request.weights_versions),
        )

    def _prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        found, prompt = self.request.prompt_results, self.request.prompt
        if self._params.prompt_logprobs is None or not isinstance(found, list):
            return None
        return [
            None if at is None else position_logprobs(self._tokenizer, token, at)
            for token, at in zip(prompt, found, strict=True)
        ]


class _Sample:
    """One sample's output and what extends its text."""

    def __init__(self, tokenizer: Tokenizer, index: int, params: SamplingParams, prompt: Sequence[int]) -> None:
        self.output = CompletionOutput(
            index,
            logprobs=None if params.logprobs is None else [],
            kept_tokens=[] if params.kept_tokens else None,
        )
        self._tokenizer, self._params = tokenizer, params
        self._stop = StopStrings(
            params.stop,
            include=params.include_stop_str_in_output,
            special_tokens=tokenizer.special_tokens if params.skip_special_tokens else None,
        )
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            prompt=prompt,
            skip_special_tokens=params.skip_special_tokens,
            marks=self._stop.marks,
            keep_first_space=params.structured_outputs is not None,  # it says what the text is, to the letter
        )

    def push(self, event: TokenEvent) -> StreamChunk:
        output, stop, token = self.output, self._stop, event.token_id
        output.token_ids.append(token)
        logprobs = None
        if event.logprobs is not None:
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + event.logprobs.logprob
            if output.logprobs is not None:
                logprobs = [position_logprobs(self._tokenizer, token, event.logprobs)]
                output.logprobs += logprobs
        if output.kept_tokens is not None and event.kept is not None:
            output.kept_tokens.append(event.kept)
        search = len(output.token_ids) >= self._params.min_tokens
        reason = event.finish_reason
        # A token of `stop_token_ids` that ends a text is no part of it, unless asked for; a stop string may name it all the same.
        ends = reason == "stop" and token in self._params.stop_token_ids
        hidden = ends and not self._params.include_stop_str_in_output and token not in stop.marks
        text = stop.push("" if hidden else self._detokenizer.push([token]), search=search)
        if reason is not None and stop.found is None:
            text += stop.push(self._detokenizer.finish(), search=search) + stop.finish()
        if stop.found is not None:
            reason, output.stop_reason = "stop", stop.found
        elif reason == "stop" and token in self._params.stop_token_ids:
            output.stop_reason = token
        output.text += text
        output.finish_reason, output.score = reason, event.sequence.score
        return StreamChunk(output.index, text, [token], reason, output.stop_reason, logprobs)

    def end(self, reason: str | None, error: str | None) -> StreamChunk:
        """Ends the text without a token."""
        text = self._stop.push(self._detokenizer.finish()) + self._stop.finish()
        self.output.text += text
        self.output.finish_reason, self.output.error = reason, error
        return StreamChunk(self.output.index, text, [], reason, error=error)


def position_logprobs(tokenizer: Tokenizer, token: int, found: TokenLogprobs) -> dict[int, Logprob]:
    """Returns the log-probabilities of one position by token id: of the token that is there, then of the most likely ones."""
    pairs = [(token, found.logprob, found.rank)]
    pairs += [
        (i, value, rank) for rank, (i, value) in enumerate(zip(found.top_ids, found.top_logprobs, strict=True), 1)
    ]
    result: dict[int, Logprob] = {}
    for i, value, rank in pairs:
        text = tokenizer.token_bytes(i).decode("utf-8", errors="replace")
        result.setdefault(i, Logprob(value, rank, text))
    return result
