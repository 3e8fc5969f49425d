"""`llm-infer bench decoding`: measures costs and gains of beams, speculation, sampling parameters and structured output.

Each figure is a ratio (or difference) of two runs that alternate, so that a busy machine slows both; medians are printed.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_infer.base.errors import UserError
from llm_infer.bench import pages
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.decoding.structured import StructuredOutputsParams
from llm_infer.llm import LLM

SUMMARIES = ("summarization",)
FREE_TEXT = ("writing", "roleplay", "humanities", "stem")
EDITS = ("Repeat this text word for word", "Correct the spelling and grammar of this text")

TEXT = (
    "The lighthouse on the northern cape was built in 1871, after three ships were lost in one winter. Its keeper, Anna "
    "Lindqvist, lit the lamp every evening for thirty-one years, and wrote down the weather and the name of each ship that "
    "passed. When the lamp was made electric in 1923, the keeper's house became a school for the children of the fishermen. "
    "Today it is a museum, and visitors can read her books of weather and ships in the room below the lamp."
)
PROMPTS = (
    "Once upon a time, in a small village by the sea, there lived an old clockmaker who",
    "The three most important things to know about the history of the railway are that",
    "Dear Sir or Madam, I am writing to ask whether the position in your laboratory is",
    "In order to bake a loaf of bread you first have to mix the flour with water and",
)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Figure:
    """One measured figure: its median, its unit, its goal, and the single measurements."""

    name: str
    value: float
    unit: str
    goal: str
    samples: tuple[float, ...]

    def __str__(self) -> str:
        low, high = min(self.samples), max(self.samples)
        return f"{self.name:<58}{self.value:>8.2f} {self.unit:<4}(goal {self.goal}; {low:.2f} … {high:.2f})"


def run(model: str, spec_bench: str | None, rounds: int, json_file: str | None, precision: str = "exact") -> None:
    """Measures and prints all figures."""
    figures: list[Figure] = []
    speculate = functools.partial(speculation, questions=_questions(spec_bench))
    for measure in (beams, sampling, structured, speculate):
        for figure in measure(model, precision, rounds):
            figures.append(figure)
            print(figure, flush=True)
    if json_file:
        report = {"model": model, "precision": precision, "rounds": rounds, "figures": [asdict(f) for f in figures]}
        Path(json_file).write_text(json.dumps(report, indent=2) + "\n")


def beams(model: str, precision: str, rounds: int) -> list[Figure]:
    """Measures beam search of width 4 beside four samples of the same prompt: time, and pages beside four separate sequences."""
    length, new, width = 32, 128, 4
    search = SamplingParams(beam_width=width, max_tokens=new, ignore_eos=True)
    draw = SamplingParams(n=width, seed=1, max_tokens=new, ignore_eos=True)
    llm = _llm(model, precision, [search], max_model_len=length + new, max_num_seqs=max(pages.WIDTHS))
    prompts = [_exactly(llm, prompt, length) for prompt in PROMPTS]
    print(*pages.table(llm.engine, prompts[0], new), sep="\n", flush=True)
    separate = width * -(-(length + new - 1) // llm.engine.config.cache.page_size)
    ratios, saved = [], []
    _time(llm, prompts[:1], search)
    _time(llm, prompts[:1], draw)
    for index in range(rounds):
        prompt = [prompts[index % len(prompts)]]
        (beam, most), (samples, _) = _alternate(
            index, lambda p=prompt: _time(llm, p, search), lambda p=prompt: _time(llm, p, draw)
        )
        ratios.append(beam / samples)
        saved.append(100 * (1 - most / separate))
    _nothing_compiled(llm)
    return [
        _figure("beam search of 4 : 4 samples, time", ratios, "×", "≤ 1.25"),
        _figure(f"beam search of 4, {length} + {new} tokens: pages saved", saved, "%", "≥ 35"),
    ]


def sampling(model: str, precision: str, rounds: int) -> list[Figure]:
    """Measures all sampling parameters at once beside greedy decoding, with 32 sequences."""
    batch, new = 32, 24
    greedy = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    everything = [
        SamplingParams(
            temperature=0.9,
            top_k=50,
            top_p=0.95,
            min_p=0.01,
            typical_p=0.97,
            repetition_penalty=1.1,
            presence_penalty=0.2,
            frequency_penalty=0.1,
            logit_bias={100: 1.0},
            min_tokens=new,
            seed=i,
            max_tokens=new,
            ignore_eos=True,
        )
        for i in range(batch)
    ]
    llm = _llm(model, precision, everything, max_model_len=64, max_num_seqs=batch)
    ids = llm.tokenizer.encode(TEXT, add_special_tokens=False)
    prompts = [ids[i : i + 8] for i in range(batch)]
    _step_seconds(llm, prompts, everything)
    _step_seconds(llm, prompts, greedy)
    extra = []
    for index in range(rounds):
        all_, plain = _alternate(
            index, lambda: _step_seconds(llm, prompts, everything), lambda: _step_seconds(llm, prompts, greedy)
        )
        extra.append(1e3 * (all_ - plain))
    _nothing_compiled(llm)
    name = f"all sampling parameters − greedy, {batch} × {llm.engine.vocab_size} logits, per step"
    return [_figure(name, extra, "ms", "≤ 6")]


def structured(model: str, precision: str, rounds: int) -> list[Figure]:
    """Measures the throughput of 8 free-running requests beside 8 that follow a JSON schema, and beside 8 free-running ones."""
    half, new = 8, 40
    prompts = [f"{prompt} (a JSON record): " for prompt in (PROMPTS * 4)[: 2 * half]]
    free = [SamplingParams(seed=i, max_tokens=new, ignore_eos=True) for i in range(2 * half)]
    schema = StructuredOutputsParams(json=SCHEMA)
    bound = [SamplingParams(seed=i, max_tokens=new, structured_outputs=schema) for i in range(half)]
    runs = [free[:half] + bound, free]
    llm = _llm(model, precision, bound, max_model_len=128, max_num_seqs=2 * half)
    for params in runs:
        _free_rate(llm, prompts, params, half)
    lost = []
    for index in range(rounds):
        beside, alone = _alternate(index, *(lambda p=params: _free_rate(llm, prompts, p, half) for params in runs))
        lost.append(100 * (1 - beside / alone))
    _nothing_compiled(llm)
    return [_figure(f"{half} free-running beside {half} schema-bound: throughput lost", lost, "%", "≤ 15")]


def speculation(model: str, precision: str, rounds: int, questions: dict[str, list[str]]) -> list[Figure]:
    """Measures decode tokens per second at batch 1 with and without n-gram proposals, by kind of prompt."""
    new, longest = 96, 1024
    options = {"max_model_len": longest + new, "max_num_seqs": 1}
    plain = _llm(model, precision, [], **options)
    ngram = _llm(model, precision, [], **options, speculative_config={"method": "ngram"})
    params = SamplingParams(temperature=0.0, max_tokens=new)
    figures = []
    copied: list[float] = []
    for kind, goal in (("edit", "≥ 1.5"), ("summarise", "≥ 1.5"), ("free", "≥ 0.95")):
        chats = [plain.chat_prompt([{"role": "user", "content": text}]) for text in questions[kind]]
        prompts = [ids for ids in chats if len(ids) <= longest][: 3 * rounds]
        if not prompts:
            raise UserError(f"no {kind} question has at most {longest} tokens: give another file to --spec-bench")
        for llm in (ngram, plain, ngram):  # to learn the times of steps of each size
            _decode_rate(llm, prompts[0], params)
        ratios = []
        for index, prompt in enumerate(prompts):
            with_, without = _alternate(
                index, lambda p=prompt: _decode_rate(ngram, p, params), lambda p=prompt: _decode_rate(plain, p, params)
            )
            ratios.append(with_ / without)
        figures.append(_figure(f"n-gram speculation, {kind} ({len(prompts)} prompts), tok/s", ratios, "×", goal))
        copied += ratios if kind != "free" else []
    figures.append(_figure("n-gram speculation, edit and summarise, tok/s", copied, "×", "≥ 1.5"))
    _nothing_compiled(plain)
    _nothing_compiled(ngram)
    speculator = ngram.engine.speculator
    assert speculator is not None
    share = 100 * speculator.num_accepted / max(1, speculator.num_drafted)
    print(f"  proposed tokens {speculator.num_drafted}, accepted {speculator.num_accepted} ({share:.0f} %)")
    return figures


def _llm(model: str, precision: str, params: Sequence[SamplingParams], **options: Any) -> LLM:
    """Makes an LLM with all programs that requests with these parameters, or without any, need."""
    llm = LLM(model, precision=precision, enable_prefix_caching=False, progress=False, **options)
    llm.warm_up(None, params)
    return llm


def _nothing_compiled(llm: LLM) -> None:
    if count := llm.engine.runner.times.compiles_after_warmup:
        raise RuntimeError(f"{count} programs were compiled while time was measured: do not use the figures")


def _time(llm: LLM, prompts: Sequence[Any], params: Any) -> tuple[float, int]:
    """Returns the seconds of a generation, and the most pages in use."""
    scheduler = llm.engine.scheduler
    with pages.at_each_plan(scheduler, lambda: pages.pages_in_use(scheduler)) as used:
        started = time.perf_counter()
        llm.generate(prompts, params)
        return time.perf_counter() - started, max(used)


def _step_seconds(llm: LLM, prompts: Sequence[list[int]], params: Any) -> float:
    """Returns the median time of a decode step of all prompts together, over the middle steps, which compute nothing else."""
    engine, times = llm.engine, []
    each = params if isinstance(params, list) else [params] * len(prompts)
    for prompt, param in zip(prompts, each, strict=True):
        engine.add_request(prompt, param)
    while engine.has_work:
        started = time.perf_counter()
        if len(engine.step()) == len(prompts):
            times.append(time.perf_counter() - started)
    return statistics.median(times[2:-2])


def _free_rate(llm: LLM, prompts: Sequence[str], params: Sequence[SamplingParams], free: int) -> float:
    """Returns the tokens per second of the first `free` requests, until the last of them ends."""
    results = llm.generate(prompts, params)[:free]
    tokens = sum(len(result.outputs[0].token_ids) for result in results)
    return tokens / max(result.metrics.total for result in results if result.metrics is not None)


def _decode_rate(llm: LLM, prompt: list[int], params: SamplingParams) -> float:
    """Returns the tokens per second after the first token."""
    result = llm.generate([prompt], params)[0]
    assert result.metrics is not None
    return (len(result.outputs[0].token_ids) - 1) / (result.metrics.total - result.metrics.time_to_first_token)


def _alternate(index: int, first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
    """Returns the results of both; each goes first in turn."""
    if index % 2:
        after = second()
        return first(), after
    return first(), second()


def _exactly(llm: LLM, prompt: str, length: int) -> list[int]:
    ids = llm.tokenizer.encode(f"{TEXT} {prompt}", add_special_tokens=False)
    return ids[-length:]


def _figure(name: str, samples: list[float], unit: str, goal: str) -> Figure:
    return Figure(name, statistics.median(samples), unit, goal, tuple(samples))


def _questions(path: str | None) -> dict[str, list[str]]:
    """Returns first turns by kind of prompt, from a file in the format of Spec-Bench, or a few of our own."""
    if path is None:
        return {
            "edit": [f"{task}:\n\n{TEXT}" for task in EDITS],
            "summarise": [f"Summarize: {TEXT}"],
            "free": [f"Go on with this story: {prompt}" for prompt in PROMPTS],
        }
    kinds: dict[str, list[str]] = {"edit": [], "summarise": [], "free": []}
    try:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            question = json.loads(line)
            text = question["turns"][0]
            if question["category"] in SUMMARIES:
                kinds["summarise"].append(text)
                # Spec-Bench has no editing task: the first sentences of its articles make one.
                beginning = " ".join(re.split(r"(?<=[.!?])\s+", text.removeprefix("Summarize:").strip())[:4])
                kinds["edit"].append(f"{EDITS[len(kinds['edit']) % len(EDITS)]}:\n\n{beginning}")
            elif question["category"] in FREE_TEXT:
                kinds["free"].append(text)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"--spec-bench {path}: {error!r}; expected lines of JSON with question_id, category and turns"
        ) from None
    return kinds
