"""Structured output beside the other rules of a draw: the masks intersect, and the text still follows its grammar."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from llm_infer.base.errors import RequestError
from llm_infer.decoding.grammar import GrammarCompiler
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.decoding.structured import StructuredOutputsParams
from llm_infer.engine.engine import Engine
from llm_infer.models.config import ModelConfig
from llm_infer.models.load import dummy_model
from llm_infer.scheduler.request import Sequence
from tests.engine.engines import EngineFactory

EOS, OTHER_EOS = 256, 257
CONFIG = ModelConfig("LlamaForCausalLM", 300, 32, 2, 4, 2, 16, 64, 256, tie_word_embeddings=True)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
}
DIGITS = tuple(range(ord("0"), ord("9") + 1))


@pytest.fixture(scope="module")
def engine() -> Engine:
    made = EngineFactory(dummy_model(CONFIG, seed=3), max_num_seqs=8, num_pages=64, max_model_len=96)()
    made.eos_token_ids = frozenset((EOS, OTHER_EOS))
    return made


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    vocabulary = [bytes([i]) if i < 256 else f"<{i}>".encode() for i in range(300)]
    return GrammarCompiler(vocabulary, range(256, 300), [EOS, OTHER_EOS], lambda text: list(text.encode()))


def run(
    engine: Engine, compiler: GrammarCompiler, structure: dict[str, Any], bad: tuple[str, ...] = (), **values: Any
) -> list[tuple[str, Sequence]]:
    """Text without its end, and the sequence, of several samples."""
    params = SamplingParams(
        **({"temperature": 1.0, "seed": 1, "n": 4, "max_tokens": 40} | values),
        bad_words=bad,
        structured_outputs=StructuredOutputsParams(**structure),
    )
    grammar = compiler.compile(params.structured_outputs)  # type: ignore[arg-type]
    request = engine.add_request([1, 2, 3], params, bad_words=[list(b.encode()) for b in bad], grammar=grammar)
    while engine.has_work:
        engine.step()
    engine.scheduler.check()
    assert engine.scheduler.usage(0) == 0.0
    assert all(token not in one.output[:-1] for one in request.sequences for token in (EOS, OTHER_EOS))
    return [(bytes(i for i in one.output if i < 256).decode(), one) for one in request.sequences]


def test_min_tokens_lengthens_what_the_grammar_can_lengthen(engine: Engine, compiler: GrammarCompiler) -> None:
    short = run(engine, compiler, {"regex": "[ab]{1,30}"}, seed=5, logit_bias={EOS: 50.0})
    assert all(len(text) == 1 and one.finish_reason == "stop" for text, one in short)
    for text, one in run(engine, compiler, {"regex": "[ab]{1,30}"}, min_tokens=20, logit_bias={EOS: 50.0}):
        assert re.fullmatch("[ab]{20}", text) and one.finish_reason == "stop"
    for text, one in run(engine, compiler, {"json": SCHEMA}, min_tokens=25, max_tokens=90, logit_bias={ord("}"): 20.0}):
        jsonschema.validate(json.loads(text), SCHEMA) if one.finish_reason == "stop" else None
        assert len(one.output) >= 25 or one.finish_reason == "error"


def test_a_grammar_that_must_end_before_min_tokens_ends_with_an_error(
    engine: Engine, compiler: GrammarCompiler
) -> None:
    for text, one in run(engine, compiler, {"choice": ["ab", "cde"]}, min_tokens=9):
        assert text in ("ab", "cde") and one.finish_reason == "error"
        assert one.error is not None and "lower min_tokens" in one.error and "structured_outputs" in one.error
    for text, one in run(engine, compiler, {"choice": ["ab", "cde"]}, min_tokens=2):
        assert text in ("ab", "cde") and one.finish_reason == "stop"


def test_ignore_eos_goes_on_as_long_as_the_grammar_does(engine: Engine, compiler: GrammarCompiler) -> None:
    for text, one in run(engine, compiler, {"regex": "[ab]*"}, ignore_eos=True, logit_bias={EOS: 50.0}, max_tokens=12):
        assert re.fullmatch("[ab]{12}", text) and one.finish_reason == "length"
    for text, one in run(engine, compiler, {"regex": "[ab]{3,7}"}, ignore_eos=True, logit_bias={EOS: 50.0}):
        assert re.fullmatch("[ab]{7}", text) and one.finish_reason == "stop"
        assert one.output[-1] in (EOS, OTHER_EOS)
    for text, one in run(engine, compiler, {"json": SCHEMA}, ignore_eos=True, logit_bias={44: 30.0, 125: 30.0}):
        assert one.finish_reason in ("stop", "length")
        if one.finish_reason == "stop":
            jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("end", [(), (EOS,)])
def test_allowed_tokens_and_grammar_intersect(engine: Engine, compiler: GrammarCompiler, end: tuple[int, ...]) -> None:
    for text, one in run(engine, compiler, {"regex": "[a-z0-9]{4}"}, allowed_token_ids=(*DIGITS, *end)):
        assert re.fullmatch("[0-9]{4}", text) and one.finish_reason == "stop", "the end needs no permission"
    schema_bytes = {*b'{}"ab:, 0123456789-x'}
    for text, one in run(
        engine,
        compiler,
        {"json": SCHEMA},
        allowed_token_ids=tuple(schema_bytes | {*end}),
        logit_bias={44: 30.0, 125: 30.0},
    ):
        assert one.finish_reason in ("stop", "length")
        if one.finish_reason == "stop":
            assert json.loads(text)["b"] == "x"
    with pytest.raises(RequestError, match="allow more tokens or change its grammar"):
        run(engine, compiler, {"regex": "[a-z]+"}, allowed_token_ids=DIGITS)


def test_bad_words_and_grammar_intersect(engine: Engine, compiler: GrammarCompiler) -> None:
    for text, one in run(engine, compiler, {"choice": ["abc", "abd", "ac"]}, bad=("bc", "ac")):
        assert text == "abd" and one.finish_reason == "stop"
    for text, _ in run(engine, compiler, {"regex": "[ab]{12}"}, bad=("aa", "bbb"), min_tokens=3):
        assert re.fullmatch("[ab]{12}", text) and "aa" not in text and "bbb" not in text
    for text, one in run(engine, compiler, {"choice": ["xab", "xac"]}, bad=("ab", "ac")):
        assert text == "xa" and one.finish_reason == "error" and "drop some of bad_words" in (one.error or "")


def test_all_of_them_together(engine: Engine, compiler: GrammarCompiler) -> None:
    for text, one in run(
        engine,
        compiler,
        {"regex": "[a-z]{2,9}[0-9]"},
        bad=("aa",),
        allowed_token_ids=(*b"abc", *DIGITS, EOS),
        min_tokens=6,
        ignore_eos=True,
    ):
        assert re.fullmatch("[abc]{2,9}[0-9]", text) and "aa" not in text
        assert one.finish_reason == ("stop" if len(text) >= 6 else "error")
        assert one.error is None or "lower min_tokens" in one.error
