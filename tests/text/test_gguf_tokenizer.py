"""Tokenizers rebuilt from GGUF metadata give llama.cpp's ids, and say clearly what they cannot rebuild."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from llm_infer.base.errors import ModelError
from llm_infer.text.gguf_tokenizer import rebuild_tokenizer
from llm_infer.text.tokenizer import Tokenizer

MODELS = [
    *(
        "smollm2",
        "bpe gpt-2",
        "bpe default",
        "bpe qwen2",
        "bpe deepseek-v3",
        "bpe smollm, bos and eos",
        "bpe llama-bpe",
        "bpe gpt-4o",
        "bpe tekken",
    ),
    *("spm", "spm no prefix", "spm phi-3"),
]


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_llamacpp(name: str, goldens: dict[str, Any], tokenizer: Tokenizer) -> None:
    golden = next(model for model in goldens["models"] if model["name"] == name)
    if golden["vocabulary"] is not None:
        tokenizer = Tokenizer.from_gguf({**goldens["vocabularies"][golden["vocabulary"]], **golden["overrides"]})
    texts = goldens["texts"]
    assert len(texts) >= 200
    assert {case[0] for case in golden["cases"]} == set(range(len(texts)))
    wrong = []
    for index, add_special, parse_special, ids in golden["cases"]:
        got = tokenizer.encode(texts[index], add_special_tokens=add_special, parse_special=parse_special)
        inner = ids[1:-1] if add_special else ids
        if not parse_special and any(map(tokenizer.is_special, inner)):
            # llama.cpp's SentencePiece merges plain text to control tokens, too; here text stays text.
            got = tokenizer.encode(texts[index], add_special_tokens=False, parse_special=False)
            assert not any(map(tokenizer.is_special, got)), (texts[index], got)
        elif got != ids:
            wrong.append((texts[index], add_special, parse_special, ids, got))
    assert not wrong, f"{len(wrong)} of {len(golden['cases'])} differ, first: {wrong[:3]}"
    assert sorted(tokenizer.eos_token_ids) == golden["eos"]


def test_goldens_cover_every_model(goldens: dict[str, Any]) -> None:
    assert [model["name"] for model in goldens["models"]] == MODELS


def test_smollm_splits_every_kind_of_digit(tokenizer: Tokenizer) -> None:
    for text in ("2024", "x²³", "½½", "٠١٢", "１２"):
        pieces = [tokenizer.decode([i]) for i in tokenizer.encode(text)]
        assert all(sum(char.isnumeric() for char in piece) <= 1 for piece in pieces), pieces


def test_characters_without_tokens_keep_their_neighbours_apart(tokenizer: Tokenizer) -> None:
    # byte 0x04 has no token in this vocabulary: it vanishes, and "he" + "llo" must not become "hello"
    assert tokenizer.encode("he\x04llo") == tokenizer.encode("he") + tokenizer.encode("llo")
    assert tokenizer.encode("\x04") == []


def test_numpy_arrays_and_empty_tokens_are_accepted(spm_metadata: Mapping[str, Any]) -> None:
    tokens = [*spm_metadata["tokenizer.ggml.tokens"], ""]
    arrays = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([*spm_metadata["tokenizer.ggml.scores"], -9e9], np.float32),
        "tokenizer.ggml.token_type": np.array([*spm_metadata["tokenizer.ggml.token_type"], 1], np.int32),
    }
    changed = Tokenizer.from_gguf({**spm_metadata, **arrays})
    assert changed.vocab_size == len(tokens)
    assert changed.encode("the same 123") == Tokenizer.from_gguf(spm_metadata).encode("the same 123")


def test_end_of_generation_ids_and_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert {0, 2} <= tokenizer.eos_token_ids
    assert len(tokenizer.special_tokens) == 17
    assert tokenizer.special_tokens["<|im_end|>"] == tokenizer.token_id("<|im_end|>") == 2
    assert tokenizer.is_special(2) and not tokenizer.is_special(100)
    assert tokenizer.chat_template is not None and "<|im_start|>" in tokenizer.chat_template


def test_harmony_end_of_channel_does_not_end_the_answer(bpe_metadata: Mapping[str, Any]) -> None:
    texts = ["<|end|>", "<|return|>", "<|call|>"]
    tokens = bpe_metadata["tokenizer.ggml.tokens"] + texts
    types = bpe_metadata["tokenizer.ggml.token_type"] + [3, 3, 3]
    changed = Tokenizer.from_gguf({**bpe_metadata, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types})
    end, returned, call = (changed.token_id(text) for text in texts)
    assert {returned, call} <= changed.eos_token_ids and end not in changed.eos_token_ids


def test_named_templates(bpe_metadata: Mapping[str, Any]) -> None:
    named = {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b", "tokenizer.chat_templates": ["x"]}
    assert rebuild_tokenizer({**bpe_metadata, **named}).chat_templates == {"default": "a", "tool_use": "b"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert'.*'gpt2'.*'llama'"),
        ({"tokenizer.ggml.model": None}, "no tokenizer.ggml.model"),
        ({"tokenizer.ggml.pre": "superbpe"}, "'superbpe' is not supported.*llama-bpe.*qwen2.*smollm"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["t h", "x"]}, r"merges\[1\] = 'x'"),
        ({"tokenizer.ggml.merges": ["t \x00"]}, r"merges\[0\]"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type has 1 entries for 571"),
        ({"tokenizer.ggml.eos_token_id": 999_999}, "eos_token_id = 999999 is outside"),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}, "bos_token_id is missing"),
    ],
)
def test_what_cannot_be_rebuilt(bpe_metadata: Mapping[str, Any], change: dict[str, object], message: str) -> None:
    metadata = {key: value for key, value in {**bpe_metadata, **change}.items() if value is not None}
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_gguf(metadata)


def test_duplicate_tokens_and_missing_byte_tokens(spm_metadata: Mapping[str, Any]) -> None:
    tokens = list(spm_metadata["tokenizer.ggml.tokens"])
    with pytest.raises(ModelError, match="'<s>' twice"):
        Tokenizer.from_gguf({**spm_metadata, "tokenizer.ggml.tokens": [*tokens[:-1], "<s>"]})
    with pytest.raises(ModelError, match="byte tokens"):
        Tokenizer.from_gguf(
            {**spm_metadata, "tokenizer.ggml.tokens": ["no byte" if t == "<0x7F>" else t for t in tokens]}
        )
