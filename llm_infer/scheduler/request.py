"""What a user asked for (Request) and the token sequences that grow from it (Sequence)."""

from __future__ import annotations

import enum
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llm_infer.base.errors import RequestError
from llm_infer.decoding.features import PLAIN, StepFeatures
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.decoding.speculative import Speculation
from llm_infer.decoding.token_rules import TokenRules
from llm_infer.kvcache.page_table import PageTable

if TYPE_CHECKING:
    import numpy as np

    from llm_infer.scheduler.strategies.strategy import Strategy


class Status(enum.Enum):
    """Where a sequence is. WAITING → RUNNING → FINISHED, with RUNNING → PREEMPTED → RUNNING when memory is short."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One prompt and how to continue it; `n` sequences grow from it, on one data-parallel shard.

    Attributes:
        request_id: names the request; unique among the unfinished ones.
        prompt: token ids.
        sampling: how to continue it, and what to return.
        eos_token_ids: ids that end a sequence unless `sampling` ignores them.
        rules: which tokens may be drawn.
        features: what its steps must be able to do.
        priority: under the policy "priority" the smaller value goes first.
        cache_salt: only requests with the same salt share pages of the prefix cache.
        prompt_only: nobody wants the token that is drawn, so the prompt may fill the context.

    These follow from them.

    Attributes:
        width: sequences that go on only together, as a group: all of a beam search, else 1. They get slots for all at
            once, and give up their pages together.
        stop_ids: ids that end a sequence (they stay in its output).
        speculate: tokens may be proposed for it: rules that look at the tokens before would have to follow every proposal.
        stepwise: after each token the host must be asked before the next is drawn.
        whole_prompt: every token of the prompt is computed, with nothing taken from the prefix cache.
        pooled: hidden states of the prompt are wanted.

    The scheduler fills in the rest. Times are in seconds of its clock; None until it has happened.

    Attributes:
        prompt_results: what the engine has collected of the prompt.
        arrival: counts requests in order of arrival.
        sequences: by sample index.
        strategy: how its sequences get their tokens.
        forked: the samples after the first are queued too (they wait until the first has computed the prompt); of a
            beam search: all beams exist.
        shard: where its pages are; None while it has none.
        weights: how often the model had got other weights when it began; only requests of the same share cached pages.
        weights_versions: names of the weights that it has run with; the engine adds them.
        num_cached_tokens: prompt tokens whose K/V the prefix cache had.
        num_preemptions: how often one of its sequences lost its pages.
        spare_slots: slots of a group, some of which has one, for those that do not run.
        uncached: beams that found different parts of themselves in the prefix cache had no pages left to share: they return
            without it.
    """

    request_id: str
    prompt: SequenceOf[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: frozenset[int] = frozenset()
    rules: TokenRules | None = None
    features: StepFeatures = PLAIN
    priority: int = 0
    cache_salt: str | None = None
    prompt_only: bool = False

    width: int = field(init=False)
    stop_ids: frozenset[int] = field(init=False)
    speculate: bool = field(init=False)
    stepwise: bool = field(init=False)
    whole_prompt: bool = field(init=False)
    pooled: bool = field(init=False)

    prompt_results: object = field(default=None, init=False)
    arrival: int = field(default=-1, init=False)
    sequences: list[Sequence] = field(default_factory=list, init=False)
    strategy: Strategy = field(init=False, repr=False)
    forked: bool = field(default=False, init=False)
    shard: int | None = field(default=None, init=False)
    weights: int = field(default=0, init=False)
    weights_versions: list[str] = field(default_factory=list, init=False)
    num_cached_tokens: int = field(default=0, init=False)
    num_preemptions: int = field(default=0, init=False)
    spare_slots: list[int] = field(default_factory=list, init=False)
    uncached: bool = field(default=False, init=False)
    arrival_time: float | None = field(default=None, init=False)
    first_scheduled_time: float | None = field(default=None, init=False)
    first_token_time: float | None = field(default=None, init=False)
    finish_time: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise RequestError("the prompt is empty: expected at least one token")
        self.width = self.sampling.beam_width or 1
        self.stop_ids = self.sampling.stop_ids(self.eos_token_ids)
        self.speculate = self.features == PLAIN
        self.stepwise = self.rules is not None and self.rules.needs_last_token
        self.pooled = StepFeatures.POOLED in self.features
        self.whole_prompt = self.pooled or StepFeatures.PROMPT_LOGPROBS in self.features

    @property
    def n(self) -> int:
        """Number of its sequences."""
        return self.sampling.num_sequences

    @property
    def members(self) -> list[Sequence]:
        """The sequences that exist: those of a beam search after the first only once the first token is chosen."""
        return self.sequences if self.forked else self.sequences[:1]

    @property
    def finished(self) -> bool:
        """Whether all its sequences have ended."""
        return all(sequence.status is Status.FINISHED for sequence in self.sequences)

    def fail(self, why: str) -> None:
        """Ends what has not ended, without the books in which it stands: they are given up together with it."""
        for sequence in self.sequences:
            if sequence.status is not Status.FINISHED:
                sequence.error, sequence.finish_reason = why, "error"
                sequence.table, sequence.slot, sequence.state = None, None, None
                sequence.snapshots = []
                sequence.num_computed = sequence.num_cached_pages = sequence.in_flight = sequence.num_drafts = 0
                sequence.status = Status.FINISHED


class Sequence:
    """One sample of a request: its tokens, and what of them is computed. Only the scheduler changes it.

    Attributes:
        request, sample_index: whose sample it is, and which.
        rank: order among all sequences; the smallest is served first and preempted last.
        tokens: prompt and output ids that the host knows.
        max_length: the sequence ends when it has this many tokens.
        stop_ids: ids that end it.
        in_flight: tokens drawn by submitted steps that have not come back: those of one step, and of two between the
            planning of a step and the commit of the step before.
        num_computed: tokens whose K/V are in the pages, or will be once the submitted steps have run.
        status: see Status.
        table: its pages; a waiting sequence has none, unless it is a fork of a sequence that has computed the prompt.
        slot: row of the device's per-sequence state on its shard (below max_num_seqs), owned while RUNNING.
        first_step: index of the first step with these pages in this slot (since it was last admitted, or became another
            beam); tells the engine when to look at all of them.
        digests: prefix-cache digests of its full pages, as far as they were needed.
        num_cached_pages: pages from the front that were offered to the prefix cache or came from it.
        finish_reason: "stop", "length", "abort" or "error" once FINISHED.
        error: what went wrong, for the user, with the finish reason "error".
        score: of a result of a beam search.
        num_drafts: proposed tokens in a step whose result is not here yet; until it is, the sequence is in no other.
        speculation: what is known of proposals for it.
        state: of a recurrent model, the page with the state behind the computed tokens; None where none is computed.
        snapshots: states behind full pages of tokens that are not committed yet: (tokens, page).
        latest: digest of the last snapshot that was taken while it drew tokens, of which the last alone is kept.
    """

    __slots__ = (
        *("digests", "error", "finish_reason", "first_step", "in_flight", "latest", "max_length", "num_cached_pages"),
        *(
            "num_computed",
            "num_drafts",
            "rank",
            "request",
            "sample_index",
            "score",
            "slot",
            "snapshots",
            "speculation",
            "state",
            "status",
            "stop_ids",
            "table",
        ),
        "tokens",
    )

    def __init__(self, request: Request, sample_index: int, rank: tuple[int, int, int], max_length: int) -> None:
        self.request = request
        self.sample_index = sample_index
        self.rank = rank
        self.tokens: list[int] = list(request.prompt)
        self.max_length = max_length
        self.stop_ids = request.stop_ids
        self.in_flight = 0
        self.num_computed = 0
        self.status = Status.WAITING
        self.table: PageTable | None = None
        self.slot: int | None = None
        self.first_step = 0
        self.digests: list[bytes] = []
        self.num_cached_pages = 0
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.score: float | None = None
        self.num_drafts = 0
        self.speculation: Speculation | None = None
        self.state: int | None = None
        self.snapshots: list[tuple[int, int]] = []
        self.latest: bytes | None = None

    @property
    def group(self) -> SequenceOf[Sequence]:
        """This sequence, and those without which it cannot go on."""
        return (self,) if self.request.width == 1 else self.request.members

    @property
    def output(self) -> list[int]:
        """New token ids that the host knows."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def length(self) -> int:
        """Tokens including those that the host does not know yet."""
        return len(self.tokens) + self.in_flight

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id!r}, sample {self.sample_index}, {self.status.value}, "
            f"{len(self.tokens)}+{self.in_flight} tokens, {self.num_computed} computed)"
        )


@dataclass(slots=True)
class TokenEvent:
    """A token came back from the device.

    Attributes:
        sequence: which sequence it extends; the token is in `sequence.tokens` already.
        token_id: the drawn id.
        finish_reason: "stop" or "length" if the sequence ended with it.
        logprobs: log-probabilities, where the request asked for them; the engine adds them.
        kept: the tokens that the draw could have given, likewise, one bit each.
    """

    sequence: Sequence
    token_id: int
    finish_reason: str | None
    logprobs: TokenLogprobs | None = None
    kept: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: of the token that is there, its rank (1 = most likely), and of the top tokens."""

    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
