"""How long a request may become, and whether it can ever run: the context, the pages and the slots there are."""

from __future__ import annotations

from dataclasses import dataclass

from llm_infer.base.errors import RequestError
from llm_infer.config import SchedulerConfig
from llm_infer.kvcache.groups import Windows, pages_at_most
from llm_infer.scheduler.request import Request


def tokens_ahead(config: SchedulerConfig) -> int:
    """Returns how many tokens of a sequence may be planned and not committed: those of the step in flight and of the next."""
    return 2 * max(config.max_num_batched_tokens, config.num_scheduler_steps)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a shard has.

    Attributes:
        max_model_len: longest sequence in tokens.
        max_num_seqs: sequences that run at the same time.
        num_pages: pages that can be handed out.
        page_size: tokens in a page.
        windows, ahead: see `Books`.
        states: sequences have states. None is kept behind the pages that beams share, so each comes back with pages of its own.
    """

    max_model_len: int
    max_num_seqs: int
    num_pages: int
    page_size: int
    windows: Windows = (None,)
    ahead: int = 0
    states: bool = False

    def longest(self, request: Request) -> int:
        """Returns the number of tokens to which a sequence of a request may grow.

        Raises:
            RequestError: it can never fit the context, the pages or the slots.
        """
        length = len(request.prompt)
        # A token that nobody wants needs no place.
        limit = self.max_model_len + request.prompt_only
        if length >= limit:
            left = "" if request.prompt_only else " and one must be left for the output"
            raise RequestError(
                f"the prompt has {length} tokens, the context holds {self.max_model_len}{left}: "
                "shorten the prompt or raise max_model_len"
            )
        if request.sampling.max_tokens is not None:
            limit = min(limit, length + request.sampling.max_tokens)
        if request.width > self.max_num_seqs:
            raise RequestError(
                f"beam_width={request.width}: {self.max_num_seqs} sequences can run at the same time: "
                "raise max_num_seqs or lower beam_width"
            )
        needed = self._most_pages(request, limit - 1)  # the last token is drawn but its K/V are never computed
        if needed > self.num_pages:
            width = request.sampling.beam_width
            each, lower = ("", "") if width is None else (f" with {width} beams", "beam_width, ")
            lower += "" if len(self.windows) == 1 else "max_num_batched_tokens, "
            of_all = "" if len(self.windows) == 1 else f", in {len(self.windows)} groups of layers"
            raise RequestError(
                f"the request can grow to {limit} tokens{each}, which need {needed} pages of {self.page_size} tokens{of_all}; "
                f"there are {self.num_pages}: raise num_pages or kv_cache_memory, or lower {lower}max_tokens or "
                "max_model_len"
            )
        return limit

    def _most_pages(self, request: Request, length: int) -> int:
        """Counts the pages of a group of sequences of so many tokens each, which may share nothing but the prompt."""
        # The page with the last prompt token is counted for each: it may be computed again by a beam that returns.
        if request.width == 1:
            return pages_at_most(self.windows, length, self.page_size, self.ahead)
        # Until all beams have returned from a preemption, layers with a window keep everything, too.
        shared = 0 if self.states else (len(request.prompt) - 1) // self.page_size
        return len(self.windows) * (shared + request.width * (-(-length // self.page_size) - shared))
