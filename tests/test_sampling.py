"""Sampling parameters and structured output through `LLM` on the default model's real weights."""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from llm_infer import LLM, SamplingParams, StructuredOutputsParams
from llm_infer.base.errors import RequestError
from llm_infer.decoding.grammar import GrammarCompiler

pytestmark = pytest.mark.real
TEXT = "The capital of France is"


@pytest.fixture(scope="module")
def llm(default_gguf: Path) -> LLM:
    llm = LLM(str(default_gguf), max_model_len=256, max_num_seqs=8, max_num_batched_tokens=8, progress=False)
    llm.warm_up(None, [SamplingParams(logprobs=1, repetition_penalty=1.1, min_tokens=1)])  # all variants in one
    return llm


def greedy(**values: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0, "max_tokens": 16} | values))


def structured(**values: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**values)


def test_stop_strings_end_the_text_and_the_engine_s_sequence(llm: LLM) -> None:
    free = llm.generate(TEXT, greedy())[0].outputs[0]
    word = re.findall(r"\w+", free.text)[3]
    stop = free.text[free.text.index(word) - 2 : free.text.index(word) + len(word)]  # begins within a token
    cut, kept = (
        llm.generate(TEXT, greedy(stop=[stop, "never"], include_stop_str_in_output=include))[0].outputs[0]
        for include in (False, True)
    )
    assert cut.text == free.text[: free.text.index(stop)] and kept.text == cut.text + stop
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert len(cut.token_ids) < len(free.token_ids) and cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert llm.engine.scheduler.usage(0) == 0.0
    chunks = list(llm.stream(TEXT, greedy(stop=stop)))
    assert "".join(chunk.text for chunk in chunks) == cut.text and chunks[-1].stop_reason == stop
    late = llm.generate(TEXT, greedy(stop=stop, min_tokens=len(cut.token_ids) + 1))[0].outputs[0]
    assert late.text.startswith(kept.text)
    token = free.token_ids[2]
    ended = llm.generate(TEXT, greedy(stop_token_ids=[token]))[0].outputs[0]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", token)


def test_logprobs_and_best_of(llm: LLM) -> None:
    output = llm.generate(TEXT, greedy(logprobs=3, max_tokens=4))[0].outputs[0]
    assert output.logprobs is not None and len(output.logprobs) == 4
    for token, found in zip(output.token_ids, output.logprobs, strict=True):
        assert len(found) == 3 and found[token].rank == 1 and found[token].logprob < 0
        assert sorted(found.values(), key=lambda x: x.rank) == sorted(found.values(), key=lambda x: -x.logprob)
        assert found[token].decoded_token == llm.tokenizer.decode([token])
    total = sum(found[token].logprob for token, found in zip(output.token_ids, output.logprobs, strict=True))
    assert output.cumulative_logprob is not None and math.isclose(output.cumulative_logprob, total)
    drawn = SamplingParams(n=4, seed=3, max_tokens=6, logprobs=0)
    every = llm.generate(TEXT, drawn)[0].outputs
    best = llm.generate(TEXT, SamplingParams(n=2, best_of=4, seed=3, max_tokens=6))[0].outputs
    ranked = sorted(every, key=lambda o: o.cumulative_logprob or 0.0, reverse=True)[:2]
    assert [o.token_ids for o in best] == [o.token_ids for o in ranked] and [o.index for o in best] == [0, 1]
    with pytest.raises(RequestError, match="best_of"):
        next(llm.stream(TEXT, SamplingParams(n=1, best_of=2)))


def test_bad_words_truncation_and_special_tokens(llm: LLM) -> None:
    assert "Paris" in llm.generate(TEXT, greedy())[0].outputs[0].text
    assert "Paris" not in llm.generate(TEXT, greedy(bad_words=["Paris"]))[0].outputs[0].text
    result = llm.generate("x y z " + TEXT, greedy(truncate_prompt_tokens=len(llm.tokenizer.encode(TEXT))))[0]
    assert result.prompt_token_ids == llm.tokenizer.encode(" " + TEXT)
    end = sorted(llm.tokenizer.eos_token_ids)[:1]
    shown = llm.generate(TEXT, greedy(allowed_token_ids=end, skip_special_tokens=False))[0].outputs[0]
    assert shown.text == llm.tokenizer.decode(end, skip_special_tokens=False) and shown.finish_reason == "stop"


def test_an_output_that_cannot_go_on_says_why(llm: LLM) -> None:
    word = llm.tokenizer.encode(" go", add_special_tokens=False)
    params = greedy(allowed_token_ids=word, bad_words=["go go"])
    (output,) = llm.generate(TEXT, params)[0].outputs
    assert output.finish_reason == "error" and output.token_ids == word
    assert output.error is not None and "drop some of bad_words" in output.error
    last = list(llm.stream(TEXT, params))[-1]
    assert (last.finish_reason, last.error) == ("error", output.error)
    assert llm.generate(TEXT, greedy())[0].outputs[0].error is None
    with pytest.raises(RequestError, match="lower min_tokens"):
        llm.generate(TEXT, greedy(allowed_token_ids=sorted(llm.tokenizer.eos_token_ids), min_tokens=2))


def test_a_grammar_that_cannot_go_on_says_so() -> None:
    compiler = GrammarCompiler([b"a", b"b", b"<eos>"], [], [2], lambda text: [0] * len(text))
    compiler._limits = compiler._library.LLParserLimits(max_lexer_states=12)
    matcher, mask = compiler.compile(structured(regex="(a|b)*a(a|b){9}")).matcher(), np.zeros(1, np.int32)
    assert matcher.fill([], mask) is None
    why = matcher.fill([0], mask)
    assert why is not None and re.search(r"structured_outputs could not go on at token 2 \(.*too many states", why)


@pytest.mark.parametrize(
    ("params", "pattern"),
    [
        (structured(choice=["green tea", "black tea"]), r"green tea|black tea"),
        (structured(regex=r"[0-9]{3}-[0-9]{4}"), r"[0-9]{3}-[0-9]{4}"),
        (structured(grammar='start: "(" NUMBER ("," NUMBER)* ")"\nNUMBER: /[0-9]{1,3}/'), r"\([0-9,]*\)?"),
    ],
)
def test_outputs_match_their_grammar(llm: LLM, params: StructuredOutputsParams, pattern: str) -> None:
    for rules in (greedy(structured_outputs=params), SamplingParams(seed=1, structured_outputs=params, n=2)):
        for output in llm.generate("A text: ", rules)[0].outputs:
            assert re.fullmatch(pattern, output.text), output.text


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (structured(regex="[a-"), "regex"),
        (structured(grammar="begin: 'x'"), "grammar"),
        (structured(json={"type": "whatever"}), "json"),
        (structured(json={"type": "integer", "minimum": 3, "maximum": 2}), "json"),
    ],
)
def test_a_bad_grammar_is_an_error_of_its_request_alone(llm: LLM, params: StructuredOutputsParams, words: str) -> None:
    with pytest.raises(RequestError, match=rf"structured_outputs\.{words}"):
        llm.generate([TEXT, TEXT], [greedy(), greedy(structured_outputs=params)])
    assert not llm.engine.scheduler.has_unfinished


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"json": "{", "regex": None},
        {"json": [1]},
        {"regex": "a", "choice": ["a"]},
        {"choice": []},
        {"choice": 3},
        {"json_object": 1},
        {"regex": "a" * 70000},
    ],
)
def test_structured_output_is_checked_when_it_is_made(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="structured_outputs"):
        structured(**values)


def test_the_message_says_what_is_wrong_with_an_expression() -> None:
    compiler = GrammarCompiler([b"a", b"<eos>"], [], [1], lambda text: [0] * len(text))
    for params in (structured(regex="(("), structured(json={"type": "string", "pattern": "(("})):
        with pytest.raises(RequestError, match=r"parse error: error: unclosed group$"):
            compiler.compile(params)


def test_thousands_of_choices_with_a_common_beginning() -> None:
    vocabulary = [bytes([i]) for i in range(256)]
    compiler = GrammarCompiler([*vocabulary, b"<eos>"], [], [256], lambda text: list(text.encode()))
    grammar = compiler.compile(structured(choice=[f"c{i}" for i in range(9000)]))
    for text, following in (("", {*b"c"}), ("c", {*b"0123456789"}), ("c0", {256}), ("c12", {*b"0123456789", 256})):
        mask = np.zeros(9, np.int32)
        assert grammar.matcher().fill([*text.encode()], mask) is None
        assert {i for i in range(257) if mask[i // 32] >> i % 32 & 1} == following, text


def test_a_compilation_that_takes_too_long_is_given_up(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler([b"a", b"<eos>"], [], [1], lambda text: [0] * len(text))
    monkeypatch.setattr(compiler, "_compile", lambda params: time.sleep(0.3))
    with pytest.raises(RequestError, match="did not compile within"):
        compiler.compile(structured(regex="a"), seconds=0.05)
    monkeypatch.undo()
    assert compiler.compile(structured(regex="a")).matcher()


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema with bounded strings and arrays, of mixed size."""
    kind = rng.choice(["string", "integer", "boolean", "enum", "array", "object"][: 6 if depth else 4])
    if kind == "string":
        return {"type": "string", "maxLength": rng.randint(1, 6)}
    if kind == "integer":
        return {"type": "integer", "minimum": 0, "maximum": rng.choice([9, 500])}
    if kind == "enum":
        return {"enum": rng.sample(["red", "green", "blue", 7, None], 3)}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth - 1), "maxItems": rng.randint(1, 3)}
    if kind == "object":
        return object_schema(rng, depth - 1)
    return {"type": kind}


def object_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["name", "age", "tags", "ok", "colour"], rng.randint(1, 3))
    properties = {name: random_schema(rng, depth) for name in names}
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def check_schemas(llm: LLM, count: int) -> None:
    rng = random.Random(7)
    schemas: list[Mapping[str, Any] | None] = [object_schema(rng, rng.randint(0, 2)) for _ in range(count)]
    schemas += [None] * (count // 4)
    rng.shuffle(schemas)
    params = [
        SamplingParams(temperature=0.8, seed=i, max_tokens=8)
        if schema is None
        else SamplingParams(temperature=0.8, seed=i, max_tokens=110, structured_outputs=structured(json=schema))
        for i, schema in enumerate(schemas)
    ]
    results = llm.generate(["Write a JSON record about a person:\n"] * len(schemas), params)
    finished = 0
    for schema, result in zip(schemas, results, strict=True):
        output = result.outputs[0]
        if schema is not None and output.finish_reason == "stop":
            jsonschema.validate(json.loads(output.text), schema)
            finished += 1
        assert output.finish_reason in ("stop", "length")
    assert finished >= 0.95 * count


def test_a_batch_of_schemas(llm: LLM) -> None:
    check_schemas(llm, 12)


@pytest.mark.sweep
def test_two_hundred_schemas(llm: LLM) -> None:
    check_schemas(llm, 200)


def test_structured_output_does_not_depend_on_the_batch(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}, "required": ["name"]}
    params = SamplingParams(seed=5, max_tokens=40, structured_outputs=structured(json=schema), repetition_penalty=1.1)
    alone = llm.generate("A person: ", params)[0].outputs[0].text
    mixed = llm.generate(["A person: ", TEXT, "A person: "], [params, greedy(), params])
    assert [mixed[0].outputs[0].text, mixed[2].outputs[0].text] == [alone, alone]
    assert json.loads(alone)


def test_special_tokens_stop_and_stop_tokens_are_no_text(llm: LLM) -> None:
    start, dot = llm.tokenizer.token_id("<|im_start|>"), llm.tokenizer.encode(".")[0]
    assert start is not None
    forced = {start: 100.0}
    for stop, count in [("<|im_start|>", 1), ("<|im_start|><|im_start|>", 2)]:
        for skip in (True, False):
            params = greedy(stop=["never", stop], logit_bias=forced, skip_special_tokens=skip)
            output = llm.generate(TEXT, params)[0].outputs[0]
            assert (output.finish_reason, output.stop_reason, output.text) == ("stop", stop, ""), (stop, skip)
            assert output.token_ids == [start] * count
    kept = greedy(stop=["<|im_start|>"], logit_bias=forced, include_stop_str_in_output=True)
    assert llm.generate(TEXT, kept)[0].outputs[0].text == "<|im_start|>"
    for include, text in [(False, ""), (True, ".")]:
        for values in (
            {"logit_bias": {dot: 100.0}},
            {"logit_bias": {dot: 100.0}, "n": 2, "temperature": 1.0, "seed": 1},
        ):
            params = greedy(stop_token_ids=[dot], include_stop_str_in_output=include, **values)
            for output in llm.generate(TEXT, params)[0].outputs:
                assert (output.text, output.token_ids, output.stop_reason) == (text, [dot], dot)
            if params.n == 1:
                assert "".join(chunk.text for chunk in llm.stream(TEXT, params)) == text


@pytest.mark.parametrize(
    ("context", "continuation", "text", "logprob"),
    [
        ("Q: Name a city. A: ", "New York City", " New York City", -5.778),
        ("Q: Name a city. A:", " New York City", " New York City", -5.778),
        ("Q: Name a city. A: ", "Paris", " Paris", None),
        ("The capital of Fra", "nce", " France", None),
        ("Hello", "<|im_end|>", "<|im_end|>", None),
    ],
)
def test_a_score_is_that_of_all_tokens_of_the_continuation(
    llm: LLM, context: str, continuation: str, text: str, logprob: float | None
) -> None:
    (score,) = llm.score([context], [continuation])
    assert score.text == text and score.token_ids == llm.tokenizer.encode(text)
    result = llm.generate(
        context.removesuffix(text[: len(text) - len(continuation)]) + text, greedy(prompt_logprobs=0)
    )[0]
    assert result.prompt_logprobs is not None
    at = result.prompt_logprobs[-len(score.token_ids) :]
    assert score.logprob == pytest.approx(
        sum(one[i].logprob for one, i in zip(at, score.token_ids, strict=True)), abs=1e-3
    )
    assert logprob is None or score.logprob == pytest.approx(logprob, abs=2e-3)


def test_prompt_logprobs_scores_and_embeddings(llm: LLM) -> None:
    params = greedy(max_tokens=12, logprobs=1)
    output = llm.generate(TEXT, params)[0].outputs[0]
    (score,) = llm.score([TEXT], [output.text])
    assert score.token_ids == output.token_ids and score.is_greedy
    assert output.cumulative_logprob is not None and math.isclose(
        score.logprob, output.cumulative_logprob, abs_tol=1e-3
    )
    worse, alone = llm.score([TEXT, ""], [" xylophone", "Hello"])
    assert not worse.is_greedy and worse.logprob < -5 and alone.logprob < 0
    for _ in range(2):  # the prefix cache gives nothing away
        result = llm.generate(TEXT + output.text, greedy(max_tokens=1, prompt_logprobs=2))[0]
        assert result.prompt_logprobs is not None and result.prompt_logprobs[0] is None
        assert all(at is not None and 2 <= len(at) <= 3 for at in result.prompt_logprobs[1:])
    texts = ["A dog runs in the park.", "A puppy is running in a park.", "Interest rates rose by a quarter point."]
    first, near, far = (np.array(each.embedding) for each in llm.embed(texts))
    assert math.isclose(float(first @ first), 1.0, abs_tol=1e-5) and first @ near > first @ far
    (again,), (last,) = llm.embed(texts[0]), llm.embed(texts[0], pooling="last", normalize=False)
    np.testing.assert_allclose(again.embedding, first, atol=1e-5)
    assert len(last.embedding) == llm.engine.runner.model.config.hidden_size
    for call in (
        lambda: llm.embed("a", pooling="max"),
        lambda: llm.score(["a"], []),
        lambda: llm.score(["a"], [""]),
        lambda: llm.score("a", ["b"]),
    ):
        with pytest.raises(RequestError):
            call()
