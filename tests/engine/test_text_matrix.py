"""With a SentencePiece vocabulary the same request gives the same text in every combination, and the text is the tokens'."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from llm_infer import LLM, SamplingParams
from llm_infer.base.outputs import CompletionOutput, RequestOutput
from llm_infer.config import SchedulerConfig
from llm_infer.decoding.features import StepFeatures
from llm_infer.decoding.structured import StructuredOutputsParams
from llm_infer.scheduler.plan import StepPlan
from llm_infer.scheduler.scheduler import Scheduler
from tests.engine.engines import STEPS
from tests.weights.tiny_models import hf_tensors, write_gguf

GOLDENS = Path(__file__).parents[1] / "goldens" / "sentencepiece_500.json"
NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"enum": ["a b", " c", "日本"]}, "yes": {"type": "boolean"}},
    "required": ["name", "yes"],
    "additionalProperties": False,
}
Valid = Callable[[str], bool]
Make = Callable[..., LLM]


def is_json(text: str, schema: dict[str, Any]) -> bool:
    jsonschema.validate(json.loads(text), schema)
    return True


# What is asked for, and which texts satisfy it.
STRUCTURES: list[tuple[dict[str, Any], Valid]] = [
    ({"choice": ["New York", "Boston"]}, lambda text: text in ("New York", "Boston")),
    ({"choice": [" Paris", " London"]}, lambda text: text in (" Paris", " London")),
    ({"choice": ["  two spaces", "日本 😀"]}, lambda text: text in ("  two spaces", "日本 😀")),
    ({"regex": "Answer: (yes|no)"}, lambda text: re.fullmatch("Answer: (yes|no)", text) is not None),
    ({"regex": " [a-c]{3,5} x"}, lambda text: re.fullmatch(" [a-c]{3,5} x", text) is not None),
    ({"json": SCHEMA}, lambda text: is_json(text, SCHEMA)),
    ({"json_object": True}, lambda text: is_json(text, {"type": "object"})),
]


def requests(llm: LLM) -> list[tuple[str, SamplingParams]]:
    """Free text, greedy and drawn, with stop strings and special tokens; then structured output."""
    greedy = partial(SamplingParams, temperature=0.0, max_tokens=20)
    drawn = partial(SamplingParams, temperature=0.7, max_tokens=20)
    the = llm.tokenizer.token_id("▁the")
    assert the is not None
    repeated = "The page table maps pages. The page table maps pages. The page"
    asked = [
        ("", greedy(ignore_eos=True)),
        ("The capital of France is", greedy(ignore_eos=True)),
        (repeated, greedy(ignore_eos=True)),
        (repeated + " ", drawn(seed=1, n=3, ignore_eos=True)),
        ("日本語 と 😀", drawn(seed=2, temperature=2.0, n=2, ignore_eos=True)),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", drawn(seed=3, skip_special_tokens=False)),
        ("  two  spaces  ", drawn(seed=4, temperature=3.0, stop=(" the", "ing"), logit_bias={the: 12.0}, n=2)),
        ("Stop at a marker", drawn(seed=5, temperature=2.0, stop="<|im_end|>", logit_bias={4: 30.0}, min_tokens=3)),
    ]
    closing = {i: 40.0 for i in range(llm.tokenizer.vocab_size) if llm.tokenizer.token_bytes(i) in (b"}", b'"', b"e")}
    for index, (structure, _) in enumerate(STRUCTURES):
        bias = closing if "json_object" in structure else {}
        structured = StructuredOutputsParams(**structure)
        params = SamplingParams(seed=index, max_tokens=60, structured_outputs=structured, logit_bias=bias)
        asked.append((("", "The answer is", repeated)[index % 3], params))
    return asked


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes LLMs that share compiled programs; limits of the scheduler are below what those allow."""
    vocabulary = json.loads(GOLDENS.read_text(encoding="utf-8"))["vocabulary"]
    tensors = hf_tensors(vocab_size=len(vocabulary["tokenizer.ggml.tokens"]), seed=1)
    tensors = {name: values * 0.1 if values.ndim == 2 else values for name, values in tensors.items()}
    path = write_gguf(tmp_path_factory.mktemp("spm") / "tiny.gguf", tensors, vocabulary=vocabulary)
    programs: dict[Any, Any] = {}

    def made(*, chunk: int = 32, pages: int = 64, steps: int = 1, cache: bool = True, speculative: Any = None) -> LLM:
        llm = LLM(
            path,
            max_model_len=128,
            max_num_seqs=8,
            max_num_batched_tokens=32,
            num_pages=64,
            enable_prefix_caching=cache,
            num_scheduler_steps=STEPS,
            speculative_config=speculative,
            check_every_step=True,
            progress=False,
        )
        engine = llm.engine
        engine.runner._programs, engine.runner.buckets = programs, (8, 32)
        for bucket in engine.runner.buckets:
            engine.runner.compile(bucket, StepFeatures.PENALTIES | StepFeatures.MASKED | StepFeatures.DRAFTS)
        engine.scheduler = Scheduler(
            SchedulerConfig(min(8, chunk), chunk, 128, num_scheduler_steps=steps),
            num_pages=pages,
            page_size=16,
            max_model_len=128,
            enable_prefix_caching=cache,
            speculator=engine.speculator,
        )
        return llm

    return made


def facts(result: RequestOutput) -> list[tuple[Any, ...]]:
    return [(one.text, one.token_ids, one.finish_reason, one.stop_reason) for one in result.outputs]


@pytest.fixture(scope="module")
def alone(make: Make) -> list[RequestOutput]:
    """Each request when nothing else is in the engine."""
    llm = make(cache=False)
    return [llm.generate(prompt, params)[0] for prompt, params in requests(llm)]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"chunk": 8, "cache": False},
        {"pages": 9, "cache": False},
        {"steps": STEPS},
        {"speculative": NGRAM},
        {"speculative": NGRAM, "pages": 9, "chunk": 8},
        {"steps": STEPS, "chunk": 16, "cache": False},
    ],
    ids=str,
)
def test_together(make: Make, alone: list[RequestOutput], values: dict[str, Any]) -> None:
    llm, steps = make(**values), []
    submit = llm.engine.runner.submit

    def counted(plan: StepPlan) -> object:
        steps.append(plan.num_steps)
        return submit(plan)

    llm.engine.runner.submit = counted  # type: ignore[method-assign,assignment]
    prompts, params = map(list, zip(*requests(llm), strict=True))
    for _ in range(1 + values.get("cache", True)):  # the second time the prefix cache is filled
        results = llm.generate(prompts, params)
        assert list(map(facts, results)) == list(map(facts, alone))
    assert llm.engine.scheduler.usage(0) == 0.0
    # What the row is about has happened.
    assert max(steps) == values.get("steps", 1)
    assert (llm.engine.scheduler.num_preemptions > 0) == ("pages" in values)
    assert values.get("cache", True) == any(result.num_cached_tokens > 0 for result in results)
    assert llm.engine.speculator is None or llm.engine.speculator.num_accepted > 0


def test_stream(make: Make, alone: list[RequestOutput]) -> None:
    llm = make()
    for (prompt, params), right in zip(requests(llm), alone, strict=True):
        outputs = [CompletionOutput(index) for index in range(params.n)]
        for chunk in llm.stream(prompt, params):
            output = outputs[chunk.index]
            output.text += chunk.text
            output.token_ids += chunk.token_ids
            output.finish_reason, output.stop_reason = chunk.finish_reason, chunk.stop_reason
        assert [(o.text, o.token_ids, o.finish_reason, o.stop_reason) for o in outputs] == facts(right), prompt


def test_text_is_what_the_tokens_add_to_the_prompt(make: Make, alone: list[RequestOutput]) -> None:
    tokenizer, spaced, cut = make().tokenizer, 0, 0
    for (prompt, params), result in zip(requests(make()), alone, strict=True):
        decode = partial(tokenizer.decode, skip_special_tokens=params.skip_special_tokens)
        before = decode(result.prompt_token_ids)
        for output in result.outputs:
            text = decode(result.prompt_token_ids + output.token_ids)[len(before) :]
            if params.structured_outputs is not None and not prompt:  # what was asked for, to the letter
                text = decode([tokenizer.encode("a", add_special_tokens=False)[0], *output.token_ids])[1:]
            if params.stop and output.finish_reason == "stop" and output.stop_reason is not None:
                assert text.startswith(output.text) and output.stop_reason not in output.text
                cut += 1
            elif params.skip_special_tokens or output.finish_reason != "stop":
                assert output.text == text, prompt
            spaced += output.text.startswith(" ")
    assert spaced >= 3 and cut >= 3


def test_structured_output_is_valid(make: Make, alone: list[RequestOutput]) -> None:
    for (structure, valid), result in zip(STRUCTURES, alone[-len(STRUCTURES) :], strict=True):
        (output,) = result.outputs
        assert output.finish_reason == "stop" and valid(output.text), (structure, output.text)


@pytest.mark.parametrize("prompt", ["", "The answer is", "The answer is ", "<|im_start|>", "😀"])
def test_structured_output_after_any_prompt(make: Make, prompt: str) -> None:
    llm = make()
    asked = [(structure, valid) for structure, valid in STRUCTURES if "json_object" not in structure]
    params = [
        SamplingParams(seed=seed, max_tokens=60, structured_outputs=StructuredOutputsParams(**structure))
        for seed, (structure, _) in enumerate(asked)
    ]
    for (structure, valid), result in zip(asked, llm.generate([prompt] * len(params), params), strict=True):
        (output,) = result.outputs
        assert output.finish_reason == "stop" and valid(output.text), (structure, output.text, output.error)


def test_choices_that_begin_with_a_space_are_each_possible(make: Make) -> None:
    structured = StructuredOutputsParams(choice=[" Paris", " London"])
    params = SamplingParams(n=20, seed=7, structured_outputs=structured)
    (result,) = make().generate("The capital of France is", params)
    assert {output.text for output in result.outputs} == {" Paris", " London"}
