"""Incremental detokenisation equals decoding everything at once, and never shows half a character."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_infer.text.detokenizer import IncrementalDetokenizer
from llm_infer.text.gguf_tokenizer import rebuild_tokenizer
from llm_infer.text.tokenizer import Tokenizer

# Half of the ids are single bytes and special tokens, so that broken and split characters are common.
IDS = st.lists(st.one_of(st.integers(0, 260), st.integers(0, 49151)), max_size=40)


@pytest.fixture(scope="session")
def spm(spm_metadata: Mapping[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(spm_metadata)


def pieces(tokenizer: Tokenizer, chunks: list[list[int]], skip: bool) -> list[str]:
    stream = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    return [*(stream.push(chunk) for chunk in chunks), stream.finish()]


def check(tokenizer: Tokenizer, ids: list[int], skip: bool, cuts: random.Random) -> None:
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces(tokenizer, [[i] for i in ids], skip)) == whole
    chunks, rest = [], ids
    while rest:
        size = cuts.randint(0, 4)
        chunks.append(rest[:size])
        rest = rest[size:]
    assert "".join(pieces(tokenizer, chunks, skip)) == whole


@settings(max_examples=150, deadline=None)
@given(ids=IDS, skip=st.booleans(), cuts=st.randoms(use_true_random=False))
def test_equals_decode_on_the_default_model(
    tokenizer: Tokenizer, ids: list[int], skip: bool, cuts: random.Random
) -> None:
    check(tokenizer, ids, skip, cuts)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 690), max_size=30), skip=st.booleans(), cuts=st.randoms(use_true_random=False))
def test_equals_decode_with_sentencepiece(spm: Tokenizer, ids: list[int], skip: bool, cuts: random.Random) -> None:
    check(spm, ids, skip, cuts)


@settings(max_examples=80, deadline=None)
@given(text=st.text(max_size=30))
def test_text_appears_character_by_character(tokenizer: Tokenizer, spm: Tokenizer, text: str) -> None:
    for model in (tokenizer, spm):
        ids = model.encode(text, add_special_tokens=False, parse_special=False)
        whole = model.decode(ids, skip_special_tokens=False)
        shown = ""
        for piece in pieces(model, [[i] for i in ids], skip=False):
            shown += piece
            assert whole.startswith(shown)
            assert "\ufffd" not in piece or "\ufffd" in whole


def test_decode_equals_the_tokenizers_library(tokenizer: Tokenizer, gguf_metadata: Mapping[str, object]) -> None:
    backend = rebuild_tokenizer(gguf_metadata).backend
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(260) if draw.random() < 0.5 else draw.randrange(49152) for _ in range(20)]
        assert tokenizer.decode(ids) == backend.decode(ids)
        assert tokenizer.decode(ids, skip_special_tokens=False) == backend.decode(ids, skip_special_tokens=False)


def test_half_a_character_waits(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("𠜎")
    assert len(ids) > 1
    stream = IncrementalDetokenizer(tokenizer)
    assert [stream.push([i]) for i in ids] == [""] * (len(ids) - 1) + ["𠜎"]
    assert stream.push(ids[:-1]) == ""
    assert stream.finish() == "\ufffd"


def test_a_broken_character_is_given_up_when_it_cannot_be_completed(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("𠜎")[:1]
    stream = IncrementalDetokenizer(tokenizer)
    assert stream.push(half) == ""
    assert stream.push(tokenizer.encode("ok")).endswith("\ufffdok")
    assert stream.finish() == ""


def test_sentencepiece_space_is_stripped_once_at_the_start(spm: Tokenizer) -> None:
    the = spm.token_id("▁the")
    assert the is not None
    stream = IncrementalDetokenizer(spm)
    assert [stream.push([1]), stream.push([the]), stream.push([the]), stream.finish()] == ["", "the", " the", ""]


def test_special_tokens_are_shown_on_request(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|im_end|>b")
    assert "".join(pieces(tokenizer, [ids], skip=True)) == "ab"
    assert "".join(pieces(tokenizer, [ids], skip=False)) == "a<|im_end|>b"
