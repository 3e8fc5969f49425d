"""Which step programs are needed, of a model and of its draft model, and compiling them side by side."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from llm_infer.decoding.features import PLAIN, StepFeatures, union
from llm_infer.engine.memory import release_free_memory
from llm_infer.engine.runner import Runner
from llm_infer.engine.step.features import for_steps, serves
from llm_infer.scheduler.request import Request


class Company(NamedTuple):
    """What a step may hold beside new requests: sequences that decode, and tokens, those of prompts included."""

    rows: int
    tokens: int

    @classmethod
    def of(cls, others: Iterable[Request], num_shards: int) -> Company:
        """Returns what each shard's part of a step may hold of these requests."""
        rows = tokens = 0
        for request in others:
            rows += request.n
            tokens += sum(max(1, len(s.tokens) - s.num_computed) for s in request.sequences)
        return cls(-(-rows // num_shards), -(-tokens // num_shards))


class WarmUp:
    """Step programs that are not there yet; iterating compiles them and yields the token bucket of each when it is done.

    Args:
        complete: these are all that will be needed; a later compilation is counted in `times.compiles_after_warmup`.
    """

    def __init__(self, *, complete: bool = False) -> None:
        self._complete = complete
        self._runners: dict[Runner, None] = {}
        self._programs: dict[tuple[Runner, int, StepFeatures], None] = {}

    def add(
        self,
        runner: Runner,
        token_counts: Iterable[int] | None,
        features: Iterable[StepFeatures],
        decode_counts: Iterable[int] | None = None,
    ) -> None:
        """Asks for programs, in every combination.

        A program with more than the wanted features serves as well, but for the plain one, which is to stay fast.

        Args:
            runner: whose programs.
            token_counts: of the steps; None stands for all.
            features: of the programs.
            decode_counts: sequences that may decode several steps at once, where the runner does that; None stands for
                those of `token_counts`.
        """
        self._runners[runner] = None
        chosen, features = _buckets(runner, token_counts), dict.fromkeys(features)
        wanted = [(bucket, each) for each in features for bucket in chosen]
        if runner.config.scheduler.num_scheduler_steps > 1:
            most = runner.bucket_of(runner.max_num_seqs)
            decode = chosen if decode_counts is None else _buckets(runner, decode_counts)
            several = dict.fromkeys(map(for_steps, features))
            wanted += [(bucket, each) for each in several for bucket in decode if bucket <= most]
        for bucket, each in wanted:
            if not runner.has(bucket, each) and not self._has(runner, bucket, each):
                self._programs[runner, bucket, each] = None

    def _has(self, runner: Runner, bucket: int, needed: StepFeatures) -> bool:
        here = [f for r, b, f in self._programs if r is runner and b == bucket]
        return needed != PLAIN and any(serves(features, needed) for features in here)

    def __len__(self) -> int:
        """Counts the programs that are to be compiled."""
        return len(self._programs)

    def __iter__(self) -> Iterator[int]:
        return self.compiled(min(4, os.cpu_count() or 1))

    def compiled(self, threads: int) -> Iterator[int]:
        """Compiles the programs with so many threads and yields the token bucket of each when it is done."""
        compile_ = {True: Runner.program, False: Runner.compile}
        # XLA compiles outside Python's lock, so a second core halves the time of a start.
        with ThreadPoolExecutor(threads) as pool:
            done = pool.map(lambda key: compile_[bool(key[2])](*key), self._programs)
            for (_, bucket, _), _ in zip(self._programs, done, strict=True):
                yield bucket
        if self._programs:
            release_free_memory()
        for runner in self._runners if self._complete else ():
            runner.is_warm = True

    def __str__(self) -> str:
        """Says what is compiled, for the user."""
        kinds = union(features for runner, _, features in self._programs if runner.name == "model").words
        kinds += sorted({runner.name for runner, *_ in self._programs} - {"model"})
        return "step programs" + (f" ({', '.join(kinds)})" if kinds else "")


def prefill_sizes(prompts: Sequence[int], slots: int, limit: int) -> list[int]:
    """Returns the tokens of the steps that compute prompts, as far as they are known in advance.

    Args:
        prompts: tokens to compute of each prompt, in the order of their admission.
        slots: sequences that run at the same time.
        limit: most tokens of a step.
    """
    first, beside = sum(prompts[:slots]), min(len(prompts), slots) - 1
    sizes = [first] if first <= limit else [limit, first % limit + beside]
    sizes += [later + beside for later in prompts[slots:]]  # one takes the place of another, or all of all others
    sizes += [sum(prompts[at : at + slots]) for at in range(slots, len(prompts), slots)]
    return [min(limit, size) for size in sizes]


def up_to(runner: Runner, num_tokens: int) -> list[int]:
    """Returns the buckets of steps of up to this many tokens: a batch gets smaller from sequence to sequence that ends."""
    most = _buckets(runner, [max(1, num_tokens)])[0]
    return [bucket for bucket in runner.buckets if bucket <= most]


def between(runner: Runner, least: int, most: int) -> list[int]:
    """Returns the buckets of steps with token counts from the least to the most."""
    first, last = (_buckets(runner, [count])[0] for count in (least, most))
    return [bucket for bucket in runner.buckets if first <= bucket <= last]


def _buckets(runner: Runner, token_counts: Iterable[int] | None) -> tuple[int, ...]:
    if token_counts is None:
        return runner.buckets
    return tuple(dict.fromkeys(runner.bucket_of(min(count, runner.buckets[-1])) for count in token_counts if count))
