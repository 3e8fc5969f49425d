"""Evaluates an `LLM` with lm-eval (0.4.13): `python -m llm_infer.integrations.lm_eval run --model llm_infer …`.

lm-eval finds models of its own alone, so its command must be started through this module, which registers ours and hands over
all arguments. In Python, importing this module is enough: `simple_evaluate(model="llm_infer", …)`, or `model=LLMInferLM(llm)`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    maybe_truncate,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from llm_infer.base.errors import RequestError, UserError
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.llm import LLM

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]
"""A request's key in lm-eval's cache, and the ids of context and continuation."""

T = TypeVar("T")

AT_A_TIME = 512
"""Requests that are handed over together, enough for any batch; results of more would only take memory."""

OURS = frozenset(
    {
        *("n", "best_of", "stop", "max_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens", "beam_width"),
        *("length_penalty", "early_stopping", "structured_outputs", "include_stop_str_in_output"),
    }
)
"""Sampling parameters that tasks cannot set: lm-eval has other names for them, or reads one answer alone."""

COMMANDS_DEVICE = "cuda:0"
"""What lm-eval's command names as the device where its user names none."""

_logger = logging.getLogger(__name__)


@register_model("llm_infer")
class LLMInferLM(TemplateLM):
    """A model of lm-eval that an `LLM` computes, with contexts and continuations encoded as lm-eval's `hf` does.

    Args:
        pretrained: the model as for `LLM`, or an LLM that is there.
        max_gen_toks: most tokens of an answer where a task says nothing.
        add_bos_token: whether texts get the tokens that the model wants around them; None leaves that to the tokenizer.
        prefix_token_id: what stands before a text without context; None takes the model's first token, or its last.
        chat_template_args: variables for the chat template, such as `{"enable_thinking": False}`.
        think_end_token: the text that ends a model's thinking, which is cut off with all before it.
        batch_size, max_batch_size: are not used, because requests join and leave a batch as they come; `max_num_seqs` is the
            setting for it.
        device: as of `LLM`.
        settings: as of `LLM`, such as `max_model_len`.

    Raises:
        UserError: a setting is unknown or does not fit, the model cannot be loaded, or it has no text.
    """

    def __init__(
        self,
        pretrained: str | LLM,
        *,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        think_end_token: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if device is not None and device != COMMANDS_DEVICE:
            settings["device"] = device
        if isinstance(pretrained, LLM) and settings:
            raise UserError(f"{', '.join(settings)}: the LLM that is there has decided that")
        self.llm = pretrained if isinstance(pretrained, LLM) else LLM(pretrained, **settings)
        self.tokenizer = self.llm.tokenizer
        if not self.tokenizer.has_text:
            raise UserError("the LLM has no tokenizer, and tasks are texts: make it without skip_tokenizer_init")
        self._name = "llm_infer" if isinstance(pretrained, LLM) else str(pretrained)
        self.max_gen_toks = max_gen_toks
        self._add_bos, self._prefix = add_bos_token, prefix_token_id
        self._template: str | None = None
        self._variables = chat_template_args
        self._think_end = think_end_token

    @property
    def max_length(self) -> int:
        """Tokens of the context."""
        return self.llm.max_model_len

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context: the one given, or the first of a text, or the last."""
        named = (self._prefix, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        found = next((token for token in named if token is not None), None)
        if found is None:
            raise UserError(
                "prefix_token_id: the model names no token that begins or ends a text, so say which to take"
            )
        return found

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval keeps requests of this tokenizer under."""
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Chooses a chat template by its name, or the default one, and returns its source; None without templates.

        Raises:
            UserError: the model has no template of this name.
        """
        if not chat_template:
            return None
        self._template = chat_template if isinstance(chat_template, str) else None
        templates = self.tokenizer.chat_templates
        if self._template is not None and self._template not in templates:
            raise UserError(f"chat_template={chat_template!r:.60}: the model has {', '.join(templates) or 'none'}")
        return templates.get(self._template or "default")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns a conversation as text in the model's format; without `add_generation_prompt` its last message goes on.

        As with `hf`, a template that takes no system message gets the conversation without.

        Raises:
            RequestError: the model has no chat template, or the messages do not fit it.
        """
        how: dict[str, Any] = dict(add_generation_prompt=add_generation_prompt, chat_template=self._template)
        how |= dict(continue_final_message=not add_generation_prompt, chat_template_kwargs=self._variables)
        try:
            ids = self.llm.chat_prompt(chat_history, **how)
        except RequestError:
            others = [message for message in chat_history if message["role"] != "system"]
            if not others or len(others) == len(chat_history):
                raise
            _logger.warning("The chat template refuses the conversation; it is tried without its system message.")
            ids = self.llm.chat_prompt(others, **how)
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns the ids of a text; one that has the first token already, as from a chat template, gets no second."""
        if add_special_tokens is None:
            first = self.tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            begun = bool(first) and string.startswith(first)
            add_special_tokens = not begun and self._add_bos is not False
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of whole texts; those longer than the context are scored window by window."""
        windows: list[Encoded] = []
        ends = []
        for (text,) in (request.args for request in requests):
            found = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length - 1, context_len=1
            )
            windows += [(None, *make_disjoint_window(window)) for window in found]
            ends.append(len(windows))
        scores = [score for score, _ in self._loglikelihood_tokens(windows, disable_tqdm)]
        totals = [float(sum(scores[begin:end])) for begin, end in zip([0, *ends], ends, strict=False)]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns one answer for each context; contexts that leave no room for it lose their beginning.

        Raises:
            UserError: a task sets something that `SamplingParams` does not have, or a request failed.
        """
        asked = [self._asked(*request.args) for request in requests]
        texts: list[str] = [""] * len(asked)
        order = sorted(range(len(asked)), key=lambda index: -len(asked[index][0]))
        for places in _parts(order, "Running generate_until requests", disable_tqdm):
            ids, params = zip(*(asked[place][:2] for place in places), strict=True)
            for place, result in zip(places, self.llm.generate(ids, params, progress=False), strict=True):
                answer = result.outputs[0]
                if answer.error is not None:
                    raise RequestError(answer.error)
                texts[place] = postprocess_generated_text(answer.text, asked[place][2], self._think_end)
                self.cache_hook.add_partial("generate_until", requests[place].args, texts[place])
        return texts

    def _asked(self, context: str, wanted: Mapping[str, Any]) -> tuple[list[int], SamplingParams, list[str]]:
        """Returns the ids of a context, how it is to be continued, and the texts that end the answer."""
        settings = dict(normalize_gen_kwargs(dict(wanted), self.max_gen_toks))
        until = [text for text in settings.pop("until") if text]
        sampled, temperature = settings.pop("do_sample"), float(settings.pop("temperature", 1.0))
        temperature = temperature if sampled else 0.0
        allowed = {each.name for each in fields(SamplingParams)} - OURS
        if unknown := [name for name in settings if name not in allowed and name != "max_gen_toks"]:
            raise UserError(f"generation_kwargs: {', '.join(unknown)}: expected some of {', '.join(sorted(allowed))}")
        most = settings.pop("max_gen_toks")
        if most >= self.max_length:
            raise UserError(f"max_gen_toks={most} leaves nothing of the context of {self.max_length} tokens")
        ids, most = maybe_truncate(self.tok_encode(context), max_gen_toks=most, max_model_len=self.max_length)
        stops = () if self._think_end is not None else until  # a text that ends an answer may be in its thinking
        return ids, SamplingParams(temperature=temperature, max_tokens=most, stop=tuple(stops), **settings), until

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each continuation, and whether it is the one that greedy decoding gives.

        A context that is too long loses its beginning.

        Raises:
            UserError: a continuation is empty, or does not fit the context.
        """
        for key, context, continuation in requests:
            if not (context and continuation and len(continuation) < self.max_length):
                raise UserError(
                    f"{key!r:.200}: {len(context)} tokens and {len(continuation)} to score, expected at least one of each, "
                    f"and fewer to score than the context of {self.max_length}"
                )
        rows = [(context + continuation)[-self.max_length :] for _, context, continuation in requests]
        starts = [len(row) - len(request[2]) for row, request in zip(rows, requests, strict=True)]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        for places in _parts(order, "Running loglikelihood requests", disable_tqdm):
            found = self.llm.score_tokens([rows[place] for place in places], [starts[place] for place in places])
            for place, logprobs, ranks, mask in zip(places, found.logprobs, found.ranks, found.mask, strict=True):
                answers[place] = float(logprobs[mask].sum(dtype=float)), bool((ranks[mask] == 1).all())
                if (key := requests[place][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answers[place])
        return answers


def _parts(items: Sequence[T], title: str, silent: bool) -> Iterator[Sequence[T]]:
    """Yields a sequence in parts, and shows how far it is."""
    with tqdm(total=len(items), desc=title, disable=silent) as bar:
        for start in range(0, len(items), AT_A_TIME):
            part = items[start : start + AT_A_TIME]
            yield part
            bar.update(len(part))


if __name__ == "__main__":
    cli_evaluate()
