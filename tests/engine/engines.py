"""Engines for tests that share compiled programs: compiling one takes longer than most tests run."""

from __future__ import annotations

from typing import Any

from llm_infer.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculativeConfig
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.engine import Engine
from llm_infer.models.load import LoadedModel
from llm_infer.scheduler.scheduler import Scheduler

STEPS = 8
"""Decode steps of programs that run several; an engine may plan fewer."""


class EngineFactory:
    """Makes engines over one model whose programs have the same shapes and are compiled once.

    `seqs` limits what runs at the same time and `pages` what the scheduler may hand out, below what the programs allow.
    `buckets`, if set, are the only token counts for which there are programs. `page_dtype` is that of CacheConfig.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        max_num_seqs: int,
        num_pages: int,
        max_model_len: int,
        draft_model: LoadedModel | None = None,
        page_dtype: str | None = None,
    ) -> None:
        self.page_dtype = page_dtype
        self.model, self.max_num_seqs, self.draft_model = model, max_num_seqs, draft_model
        self.num_pages, self.max_model_len = num_pages, max_model_len
        self.buckets: tuple[int, ...] | None = None
        self._programs: dict[Any, Any] = {}
        self._draft_programs: dict[Any, Any] = {}

    def __call__(
        self,
        *,
        chunk: int = 64,
        seqs: int | None = None,
        pages: int | None = None,
        cache: bool = True,
        overlap: bool = True,
        policy: str = "fcfs",
        speculative: SpeculativeConfig | None = None,
        steps: int = 1,
    ) -> Engine:
        config = EngineConfig(
            # No states but those two of each sequence, of which some are spare: the same shapes without prefix caching.
            CacheConfig(
                num_pages=self.num_pages, enable_prefix_caching=cache, dtype=self.page_dtype, num_state_snapshots=0
            ),
            SchedulerConfig(
                self.max_num_seqs, max(chunk, self.max_num_seqs), self.max_model_len, policy, num_scheduler_steps=STEPS
            ),
            overlap=overlap,
            check_every_step=True,
            speculative=speculative,
        )
        drafts = speculative is not None and speculative.method == "draft_model"
        engine = Engine(self.model, config, draft_model=self.draft_model if drafts else None)
        engine.runner._programs = self._programs
        if engine._draft_model is not None:
            engine._draft_model.runner._programs = self._draft_programs
        for runner in (engine.runner, getattr(engine._draft_model, "runner", engine.runner)):
            runner.buckets = self.buckets or runner.buckets
        engine.scheduler = Scheduler(
            SchedulerConfig(
                seqs or min(self.max_num_seqs, chunk), chunk, self.max_model_len, policy, num_scheduler_steps=steps
            ),
            num_pages=pages or self.num_pages,
            page_size=config.cache.page_size,
            max_model_len=self.max_model_len,
            enable_prefix_caching=cache,
            windows=engine.runner.step_programs.groups.windows,
            num_states=engine.runner.step_programs.num_states,
            speculator=engine.speculator,
        )
        return engine


def without_clock(engine: Engine) -> None:
    """Lengths of proposals follow from acceptance alone, not from how busy the machine is."""
    if (speculator := engine.speculator) is not None:
        prepare = speculator.proposer.prepare
        speculator.observe_time = lambda *_: None  # type: ignore[method-assign]
        speculator.proposer.prepare = lambda asked: prepare(asked) and None  # type: ignore[method-assign]


def run_all(
    engine: Engine, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]
) -> list[list[list[int]]]:
    """New tokens of each sample of each prompt; verifies that no page is lost at the end."""
    each = params if isinstance(params, list) else [params] * len(prompts)
    requests = [engine.add_request(prompt, param) for prompt, param in zip(prompts, each, strict=True)]
    while engine.has_work:
        engine.step()
    engine.scheduler.check()
    assert engine.scheduler.usage(0) == 0.0, "pages are still in use although nothing runs"
    return [[sequence.output for sequence in request.sequences] for request in requests]


def greedy(engine: Engine, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
    """Greedy continuations of exactly these lengths."""
    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in counts]
    return [samples[0] for samples in run_all(engine, prompts, params)]
