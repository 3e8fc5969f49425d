"""The engine: requests of token ids in, events with token ids out. One step is schedule, submit, commit the step before."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Unpack

from llm_infer.base.errors import ProcessLostError, UserError
from llm_infer.base.forks import refuse_lost_child
from llm_infer.config import EngineConfig
from llm_infer.decoding.features import PLAIN, StepFeatures, union
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.decoding.speculative import Speculator
from llm_infer.engine.draft_model import DraftModel
from llm_infer.engine.memory import out_of_memory_names_the_setting
from llm_infer.engine.platform import why_not_invariant
from llm_infer.engine.requests import RequestOptions, make_request
from llm_infer.engine.results import attach_draws, beam_candidates, collect_prompts
from llm_infer.engine.runner import PendingStep, Runner
from llm_infer.engine.step.features import FOR_PROMPT
from llm_infer.engine.step.sharding import StepSharding
from llm_infer.engine.warm_up import Company, WarmUp, between, prefill_sizes, up_to
from llm_infer.models.load import LoadedModel
from llm_infer.models.params import missing
from llm_infer.parallel.channel import Follower, Leader, end_process
from llm_infer.parallel.distributed import Channel
from llm_infer.scheduler.plan import StepPlan
from llm_infer.scheduler.request import Request, Sequence, TokenEvent
from llm_infer.scheduler.scheduler import Scheduler
from llm_infer.scheduler.strategies.speculative import MAX_DRAFTS


@dataclass(slots=True)
class EngineTimes:
    """Seconds spent by the host in each part of the steps, summed; `device` is waiting for results."""

    steps: int = 0
    schedule: float = 0.0
    device: float = 0.0
    commit: float = 0.0


class Engine:
    """Continuous batching over paged KV memory.

    Args:
        model: a loaded model.
        config: limits, cache and seed.
        eos_token_ids: tokens that end a sequence.
        draft_model: proposes tokens, with the speculative method "draft_model".
        device_memory: bytes of each device; None asks the devices.
        channel: connects the processes of several hosts, which all make the same engine: the first one uses it, the
            others `follow`.

    Attributes:
        weights_version: what the weights are called; "update-0" at first.
        levels: sets of features for which programs are made, so that mixed requests need no program for each mixture: the
            first that has all. With none, each mixture has its own.

    Raises:
        UserError: the configuration does not fit the model, or the draft model does not.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig | None = None,
        eos_token_ids: Iterable[int] = (),
        *,
        draft_model: LoadedModel | None = None,
        device_memory: int | None = None,
        channel: Channel | None = None,
    ) -> None:
        refuse_lost_child()
        config = config or EngineConfig()
        model.config.check_context(config.scheduler.max_model_len)
        if config.numerics == "invariant":
            platform = StepSharding.of(model.config, model.mesh).platform
            if why_not := why_not_invariant(model, platform):
                raise UserError(f"numerics='invariant': {why_not}")
        self.config = config
        self.max_model_len = config.scheduler.max_model_len or model.config.max_position_embeddings
        self.vocab_size = model.config.vocab_size
        self._num_shards = model.num_shards
        self.eos_token_ids = frozenset(eos_token_ids)
        self.times = EngineTimes()
        self._channel = channel
        self.runner = Runner(
            model,
            config,
            max_model_len=self.max_model_len,
            device_memory=device_memory,
            draft_model=draft_model,
            channel=channel,
        )
        self._num_pages = self.runner.num_pages
        self.speculator, self._draft_model = self._new_speculator(draft_model)
        self.scheduler = self._new_scheduler()
        self._in_flight: PendingStep | None = None
        self._num_requests = 0
        self.levels: SequenceOf[StepFeatures] = ()
        self.weights_version = "update-0"
        self._num_updates = 0
        self._asleep = False
        self._unsettled = False  # see _as_a_whole
        self._lost: str | None = None  # which process of another host is gone

    def _new_speculator(self, loaded: LoadedModel | None) -> tuple[Speculator | None, DraftModel | None]:
        config, speculative = self.config, self.config.speculative
        draft_model = None
        if (loaded is not None) != (speculative is not None and speculative.method == "draft_model"):
            raise UserError("a draft model is needed by the speculative method 'draft_model', and by no other")
        if speculative is None:
            return None, None
        if loaded is not None:
            draft_model = DraftModel(
                loaded,
                self.vocab_size,
                config,
                speculative.num_speculative_tokens,
                num_pages=self._num_pages,
                max_model_len=self.max_model_len,
                num_shards=self._num_shards,
                channel=self._channel,
            )
        most = config.scheduler.max_num_batched_tokens
        bucket_of = lambda tokens: self.runner.bucket_of(min(tokens, most))  # noqa: E731
        return Speculator(speculative, bucket_of, draft_model), draft_model

    def warm_up(self, token_counts: Iterable[int] | None = None, features: Iterable[StepFeatures] = (PLAIN,)) -> WarmUp:
        """Returns the step programs, of a draft model too, for steps of these token counts; iterating compiles them.

        By default those for all counts; afterwards nothing compiles for requests whose features (`features_of` their
        parameters) together are within one of `features`. Proposed tokens count, too.
        """
        features, counts = list(features), None if token_counts is None else list(token_counts)
        if self.speculator is not None:  # the plain programs stay, for steps without proposals
            features = [each for each in features if each == PLAIN] + [each | StepFeatures.DRAFTS for each in features]
        programs = WarmUp(complete=counts is None)
        programs.add(self.runner, counts, features)
        if self._draft_model is not None:
            programs.add(self._draft_model.runner, counts, (PLAIN,))
        return programs

    def warm_up_for(self, requests: SequenceOf[Request]) -> WarmUp:
        """Returns the step programs that requests need which have just been made or added; iterating compiles them.

        Those of their prompts, as far as the prefix cache does not have them, and of decoding while sequence after
        sequence ends; also together with what else runs, whose rows are then in the same steps.
        """
        limits, shards = self.config.scheduler, self._num_shards
        features = self._level(self.features | self._features_of(requests))
        prompts = [self.scheduler.num_uncached(request) for request in requests]
        beside = Company.of(set(self.scheduler.requests.values()) - set(requests), shards)
        # Of a sample after the first, the last token of the prompt is a step of its own.
        decoding = sum(request.n - (request.sampling.max_tokens == 1) for request in requests)
        decoding = min(-(-decoding // shards), limits.max_num_seqs)
        most, sizes = limits.max_num_batched_tokens, []
        for shard in range(min(shards, len(prompts))):
            for size in filter(None, prefill_sizes(prompts[shard::shards], limits.max_num_seqs, most)):
                sizes += between(self.runner, size, min(most, size + beside.tokens))
        if decoding and beside.tokens > beside.rows:  # the others' prompts are in its steps
            sizes += between(self.runner, 1, min(most, decoding + beside.tokens))
        programs = WarmUp()
        programs.add(self.runner, sizes, [features], ())
        if decoding:
            decoding = min(decoding + beside.rows, limits.max_num_seqs)
            drafts = 0 if self.speculator is None else min(MAX_DRAFTS, decoding * (self.speculator.max_tokens - 1))
            decode = up_to(self.runner, min(most, decoding + drafts))
            features = self._level(features & ~FOR_PROMPT)
            programs.add(self.runner, decode, [features], up_to(self.runner, decoding))
        if decoding and self._draft_model is not None:
            self._draft_model.warm_up(programs, [len(request.prompt) for request in requests], decoding)
        return programs

    def _level(self, features: StepFeatures) -> StepFeatures:
        """Returns the first of `levels` that has these features; themselves if there is none."""
        drafts = features & StepFeatures.DRAFTS
        return next((level for level in self.levels if (features & ~drafts) in level), features) | drafts

    def add_request(
        self,
        prompt_ids: SequenceOf[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        queue: bool = True,
        **options: Unpack[RequestOptions],
    ) -> Request:
        """Queues a request.

        Args:
            prompt_ids: token ids of the prompt, at least one.
            params: how to sample; greedy rows have temperature 0.
            request_id: a name for `abort`; by default a running number.
            priority: smaller runs earlier under the "priority" policy.
            cache_salt: requests share cached prefixes only with requests of the same salt.
            bad_words: token sequences that are never completed: the tokens of `params.bad_words`.
            grammar: what the output must match: the compiled form of `params.structured_outputs`.
            pooled: collect hidden states of the prompt: `request.prompt_results` is then a `PooledPrompt`.
            prompt_only: nobody wants the token that is drawn, so the prompt may fill the context.
            queue: False leaves that to `queue`, so that `warm_up_for` can be told of the request before.

        Raises:
            RequestError: the prompt is empty, prompt or parameters hold ids outside the vocabulary, no token may be drawn,
                or the request can never fit context or pages.
        """
        self._ready()
        index, self._num_requests = self._num_requests, self._num_requests + 1
        request = make_request(
            prompt_ids,
            params or SamplingParams(),
            str(index) if request_id is None else request_id,
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
            # Unseeded requests still repeat from run to run, and differ from each other.
            seed=(self.config.seed, index),
            **options,
        )
        self.scheduler.prepare(request)  # refuses what never fits, before anything changes
        if queue:
            self.queue(request)
        return request

    def queue(self, request: Request) -> None:
        """Has a request run that `add_request` has made."""
        self._ready()
        with self._as_a_whole():
            request.weights_versions = [self.weights_version]
            self.scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """Ends a request; its pages are free at once. Unknown ids are ignored: it may just have finished."""
        self._ready()
        with self._as_a_whole():
            self.scheduler.abort(request_id)

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Ends one sequence, for example at a stop string; tokens in flight are dropped."""
        with self._as_a_whole():
            self.scheduler.finish(sequence, reason)

    @property
    def draft_runner(self) -> Runner | None:
        """What runs the draft model, if there is one."""
        return None if self._draft_model is None else self._draft_model.runner

    def set_weights(self, model: LoadedModel, version: str | None = None, draft: LoadedModel | None = None) -> None:
        """Goes on with the weights of `model`, which `with_weights` made of this engine's; nothing is compiled.

        Cached prefixes are forgotten. Requests that run keep the keys and values that they have. A step that the device
        may still be running has the old weights.

        Args:
            model: the model with other parameters.
            version: a name for them; None counts.
            draft: the draft model with other parameters; None leaves it as it is.

        Raises:
            UserError: there are several hosts.
        """
        self._ready(asleep=True)
        if self._channel is not None:
            raise UserError("update_weights: with several hosts weights cannot be changed yet; make the LLM again")
        with self._as_a_whole():
            self._num_updates += 1
            self.weights_version = f"update-{self._num_updates}" if version is None else version
            self.runner.model = model
            if draft is not None and self._draft_model is not None:
                self._draft_model.runner.model = draft
            self.scheduler.forget_prefixes()
            for request in self.scheduler.requests.values():
                began = request.first_scheduled_time is not None
                request.weights_versions = [*(request.weights_versions if began else ()), self.weights_version]

    def sleep(self, *, weights: bool) -> None:
        """Gives back the memory of all pages, and of the weights; nothing can be asked until `wake`.

        Raises:
            UserError: requests run, or there are several hosts.
        """
        self._ready(asleep=True)
        if self.has_work or self._channel is not None:
            raise UserError("sleep: requests run" if self.has_work else "sleep: there are several hosts")
        with self._as_a_whole():
            self._asleep = True
            self.scheduler = self._new_scheduler()
            self.runner.sleep(weights=weights)
            if self._draft_model is not None:
                self._draft_model.runner.sleep(weights=False)

    def wake(self) -> None:
        """Makes empty pages again after `sleep`; no effect on an engine that is awake.

        Raises:
            UserError: weights are missing that were given up and not set since.
        """
        self._ready(asleep=True)
        if (gone := missing(self.runner.model.params)) != []:
            raise UserError(
                f"wake: the weights were given up and {len(gone)} parameters are not set since ({', '.join(gone[:5])} …): "
                "call update_weights with all of them first"
            )
        if self._asleep:
            self.start_anew("the engine slept: ask again")
            self._asleep = False

    def follow(self) -> None:
        """Runs what the first process runs until that ends; for every process but the first."""
        assert isinstance(self._channel, Follower)
        runners = {self.runner.name: self.runner}
        if self._draft_model is not None:
            runners[self._draft_model.runner.name] = self._draft_model.runner
        try:
            while (message := self._channel.receive())[0]["do"] != "stop":
                runners[message[0]["runner"]].obey(*message)
        except Exception as error:  # of any kind: the others wait for this process in vain, so it must not linger
            traceback.print_exc()
            end_process(f"process {self._channel.process} failed: {error}")

    @property
    def has_work(self) -> bool:
        """Whether a further `step` can produce anything."""
        return self._in_flight is not None or self.scheduler.has_unfinished

    @property
    def features(self) -> StepFeatures:
        """What the unfinished requests need of the step programs, all together."""
        return self._features_of(self.scheduler.requests.values())

    def _features_of(self, requests: Iterable[Request]) -> StepFeatures:
        drafts = PLAIN if self.speculator is None else StepFeatures.DRAFTS
        return drafts | union(request.features for request in requests)

    @out_of_memory_names_the_setting()
    def step(self) -> list[TokenEvent]:
        """Plans and starts one step, then takes in the results of the step before (while the new one runs).

        Raises:
            ProcessLostError: a process of another host is gone.
            BaseException: whatever struck, Ctrl-C included; all requests have ended with an error then (`start_anew`).
        """
        self._ready()
        try:
            with self._as_a_whole():
                return self._step()
        except BaseException as error:
            # Of another host's end this process hears a little later than the device.
            if isinstance(self._channel, Leader):
                self._lost = self._channel.loss(2.0 if isinstance(error, Exception) else 0.0)
            self.start_anew(f"a step of the engine failed ({type(error).__name__}: {error!s:.200}): ask again")
            if self._lost is not None:
                raise ProcessLostError(self._lost) from error
            raise

    def _step(self) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        if self._in_flight is not None and _host_comes_first(self._in_flight.plan):
            events = self._commit(self._in_flight)
            self._in_flight = None
        started = time.perf_counter()
        plan = self.scheduler.schedule()
        self.times.schedule += time.perf_counter() - started
        compiles, submitted = self.runner.times.compiles, time.perf_counter()
        pending = self.runner.submit(plan) if plan is not None else None
        events += self._commit(self._in_flight)
        self._in_flight = pending
        if pending is not None:
            for sequence, why in pending.dead.items():
                sequence.error = why
                self.scheduler.finish(sequence, "error")
        if not self.config.overlap or self.scheduler.needs_results:
            alone = not events
            events += self._commit(self._in_flight)
            self._in_flight = None
            if (
                plan is not None
                and alone
                and compiles == self.runner.times.compiles
                and self.speculator
                and plan.num_steps == 1
            ):
                self.speculator.observe_time(plan.num_tokens, time.perf_counter() - submitted)
        self.times.steps += plan is not None
        if self.config.check_every_step:
            self.scheduler.check()
        return events

    @contextmanager
    def _as_a_whole(self) -> Iterator[None]:
        """Marks the books as not to be trusted while they change: an exception may strike between any two lines.

        The mark is only taken away at the end, so it also holds where what cleans up after an exception is itself struck.
        """
        self._unsettled = True
        yield
        self._unsettled = False

    def _ready(self, *, asleep: bool = False) -> None:
        """Makes sure, before anything else, that the engine can compute and that nothing is left of a change that did not end."""
        refuse_lost_child()
        if self._lost is not None:
            raise ProcessLostError(self._lost)
        if self._asleep and not asleep:
            raise UserError("the engine sleeps: wake it first")
        if self._unsettled:
            self.start_anew("the engine was interrupted: ask again")

    def start_anew(self, why: str) -> None:
        """Ends all requests with the error `why` and begins with empty pages; needs nothing of books, pages or device.

        If the devices of all hosts are not there any more, there is no new beginning.
        """
        self._unsettled = True
        for request in list(self.scheduler.requests.values()):
            request.fail(why)
        self._in_flight = None
        self.scheduler = self._new_scheduler()
        if self._lost is None:
            self.runner.reset()
            if self._draft_model is not None:
                self._draft_model.reset()
        self._unsettled = False

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(
            self.config.scheduler,
            num_pages=self._num_pages,
            page_size=self.config.cache.page_size,
            max_model_len=self.max_model_len,
            num_shards=self._num_shards,
            enable_prefix_caching=self.config.cache.enable_prefix_caching,
            windows=self.runner.step_programs.groups.windows,
            num_states=self.runner.step_programs.num_states,
            speculator=self.speculator,
        )

    def _commit(self, pending: PendingStep | None) -> list[TokenEvent]:
        if pending is None:
            return []
        started = time.perf_counter()
        outputs = pending.read()
        read = time.perf_counter()
        collect_prompts(pending.plan, outputs)
        candidates = beam_candidates(pending.plan, outputs) if "beam_ids" in outputs else ()
        events = self.scheduler.commit(pending.plan, outputs["ids"].tolist(), candidates)
        attach_draws(events, pending.plan, outputs)
        self.times.device += read - started
        self.times.commit += time.perf_counter() - read
        return events


def _host_comes_first(plan: StepPlan) -> bool:
    """Tells whether the next draw of a row depends, on the host, on the id that this step draws for it."""
    return any(row.samples and row.sequence.request.stepwise for rows in plan.rows for row in rows)
