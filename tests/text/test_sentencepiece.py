"""A SentencePiece vocabulary gives SentencePiece's ids and texts, from GGUF metadata and from a tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers

from llm_infer.text.detokenizer import IncrementalDetokenizer
from llm_infer.text.gguf_tokenizer import rebuild_tokenizer
from llm_infer.text.tokenizer import Tokenizer

GOLDENS: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "goldens" / "sentencepiece_500.json").read_text(encoding="utf-8")
)
FORMS = ("gguf", "prepend", "metaspace first", "metaspace always")


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    """In which form the vocabulary is published."""
    return request.param


@pytest.fixture(scope="module")
def spm(form: str, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The vocabulary in each form."""
    if form == "gguf":
        return Tokenizer.from_gguf(GOLDENS["vocabulary"])
    state = json.loads(rebuild_tokenizer(GOLDENS["vocabulary"]).backend.to_str())
    model, size = state["model"], len(GOLDENS["vocabulary"]["tokenizer.ggml.tokens"])
    # A tokenizer.json has no tokens for characters that only texts of special tokens have.
    model["vocab"] = {text: i for text, i in model["vocab"].items() if i < size}
    model["merges"] = [pair for pair in model["merges"] if set(pair) <= model["vocab"].keys()]
    backend: Any = Backend.from_str(json.dumps(state))
    if form.startswith("metaspace"):
        scheme: Any = form.split()[1]
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        steps = [decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace(prepend_scheme=scheme, split=False)]
        backend.decoder = decoders.Sequence(steps)
    directory = tmp_path_factory.mktemp("spm")
    backend.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    return Tokenizer.from_hf_directory(directory)


def differences(found: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    return {key: (found[key], right[key]) for key in right if found[key] != right[key]}


def test_ids(spm: Tokenizer, form: str) -> None:
    right = {text: ids for text, ids, *_ in GOLDENS["texts"]}
    if form.startswith("metaspace"):  # there a text that begins with a space gets no other
        right = {text: ids for text, ids in right.items() if not text.startswith((" ", "▁"))}
    found = {text: spm.encode(text, add_special_tokens=False, parse_special=False) for text in right}
    assert len(right) >= 80 and not differences(found, right)
    assert spm.encode("the model")[0] == spm.bos_token_id == 1 and spm.eos_token_ids >= {2}


def test_ids_with_special_tokens() -> None:
    # llama.cpp puts no space after a special token; how a tokenizer.json has it depends on its form.
    tokenizer = Tokenizer.from_gguf(GOLDENS["vocabulary"])
    right = {text: (parsed or [ids])[0] for text, ids, *parsed in GOLDENS["texts"]}
    found = {text: tokenizer.encode(text, add_special_tokens=False) for text in right}
    assert not differences(found, right)
    assert sum(len(case) == 3 for case in GOLDENS["texts"]) >= 5


def test_texts_come_back(spm: Tokenizer) -> None:
    for text, ids, *_ in GOLDENS["texts"]:
        assert spm.decode(ids) == text.replace("▁", " "), text


def test_continuations(spm: Tokenizer) -> None:
    assert len(GOLDENS["continuations"]) >= 80
    assert sum(text.startswith(" ") for *_, text in GOLDENS["continuations"]) >= 30
    for before, after, text in GOLDENS["continuations"]:
        assert spm.decode(before + after)[len(spm.decode(before)) :] == text
        stream = IncrementalDetokenizer(spm, prompt=before)
        assert "".join(stream.push([i]) for i in after) + stream.finish() == text, (before, after)


def test_forced_texts_have_exactly_their_bytes(spm: Tokenizer) -> None:
    for text in [case[0] for case in GOLDENS["texts"]] + ['{"', '": ', "New York", " Paris"]:
        ids = spm.exact_tokens(text)
        assert b"".join(map(spm.token_bytes, ids)) == text.encode(), text
        assert not any(map(spm.is_special, ids))
