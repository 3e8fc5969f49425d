"""Published vocabularies give llama.cpp's ids, and tokens of exactly the bytes of a text that goes on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from llm_infer.base.errors import ModelError
from llm_infer.text.tokenizer import Tokenizer
from llm_infer.weights.gguf import GGUFFile

GOLDENS: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "goldens" / "vocabularies_llamacpp.json").read_text(encoding="utf-8")
)["vocabularies"]
REFUSED = {
    "gemma-4": "tokenizer.ggml.model = 'gemma4'",
}


def vocabulary(shared_data: Path, name: str) -> Tokenizer:
    file = shared_data / "vocab" / f"ggml-vocab-{name}.gguf"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    assert hashlib.sha256(file.read_bytes()).hexdigest() == GOLDENS[name]["sha256"], "another file than the goldens'"
    return Tokenizer.from_gguf(GGUFFile(file).metadata)


@pytest.mark.parametrize("name", [name for name in GOLDENS if name not in REFUSED])
def test_ids_are_those_of_llamacpp(shared_data: Path, goldens: dict[str, Any], name: str) -> None:
    tokenizer, right, wrong = vocabulary(shared_data, name), GOLDENS[name], []
    assert len(goldens["texts"]) >= 300
    for special in (True, False):
        digests = right[f"{special} {special}"].split()
        for text, digest in zip(goldens["texts"], digests, strict=True):
            ids = tokenizer.encode(text, add_special_tokens=special, parse_special=special)
            if hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:6] != digest:
                wrong.append((text, special, ids))
    assert not wrong, f"{len(wrong)} differ, first: {wrong[:9]}"
    assert sorted(tokenizer.eos_token_ids) == right["eos"]

    before = tokenizer.encode("a", add_special_tokens=False)
    for text in goldens["texts"]:  # as a text that goes on
        ids = tokenizer.exact_tokens(text)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode(), text
        assert tokenizer.decode(before + ids, skip_special_tokens=False) == "a" + text, text


@pytest.mark.parametrize("name", REFUSED)
def test_refused(shared_data: Path, name: str) -> None:
    with pytest.raises(ModelError, match=REFUSED[name]):
        vocabulary(shared_data, name)
