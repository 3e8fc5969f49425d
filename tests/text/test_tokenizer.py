"""Tokenizers of Hugging Face directories, exact token bytes, and round trips."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llm_infer.base.errors import ModelError, RequestError
from llm_infer.text.tokenizer import Tokenizer


def train(directory: Path, frame: bool = False) -> tokenizers.Tokenizer:
    """A small byte-level BPE, saved in `directory` as a Hugging Face model directory is."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpus = ["the cat sat on the mat", "where there is a will there is a way", "naïve café 日本"] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    backend.enable_truncation(4)
    if frame:
        backend.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 0)])
    backend.save(str(directory / "tokenizer.json"))
    return backend


def write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def test_directory_with_all_files(tmp_path: Path) -> None:
    backend = train(tmp_path, frame=True)
    write(tmp_path / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "<s>"})
    write(
        tmp_path / "tokenizer_config.json",
        {
            "eos_token": {"content": "</s>", "special": True},
            "add_bos_token": False,  # tokenizer.json decides
            "chat_template": [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}],
        },
    )
    write(tmp_path / "generation_config.json", {"eos_token_id": [1, 2]})
    write(tmp_path / "config.json", {"eos_token_id": 7})
    tokenizer = Tokenizer.from_hf_directory(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.eos_token_ids == {1, 2, 7}
    assert tokenizer.chat_templates == {"default": "A", "tool_use": "B"}
    assert tokenizer.special_tokens == {"<s>": 0, "</s>": 1, "<|im_end|>": 2}
    backend.no_truncation()
    text = "there is a café<|im_end|> 日"
    plain = backend.encode(text, add_special_tokens=False).ids
    assert len(plain) > 4  # the file's truncation is not ours
    assert tokenizer.encode(text) == [0, *plain]
    assert tokenizer.encode(text, add_special_tokens=False) == plain
    literal = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    assert 2 not in literal and tokenizer.decode(literal) == text
    assert tokenizer.decode(plain) == "there is a café 日"
    assert tokenizer.decode(plain, skip_special_tokens=False) == text
    assert tokenizer.vocab_size == backend.get_vocab_size()

    (tmp_path / "chat_template.jinja").write_text("C", encoding="utf-8")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("D", encoding="utf-8")
    assert Tokenizer.from_hf_directory(tmp_path).chat_templates == {"default": "C", "tool_use": "B", "rag": "D"}


def test_directory_with_tokenizer_json_alone(tmp_path: Path) -> None:
    train(tmp_path)
    tokenizer = Tokenizer.from_hf_directory(str(tmp_path))
    assert tokenizer.chat_template is None and tokenizer.bos_token_id is None
    assert tokenizer.eos_token_id is None and tokenizer.eos_token_ids == frozenset()
    assert tokenizer.encode("the cat") == tokenizer.encode("the cat", add_special_tokens=False) != []


def test_special_token_that_only_the_configuration_marks(tmp_path: Path) -> None:
    train(tmp_path)
    write(tmp_path / "tokenizer_config.json", {"pad_token": "Ġthe"})
    tokenizer = Tokenizer.from_hf_directory(tmp_path)
    assert tokenizer.is_special(tokenizer.token_id("Ġthe") or -1)


def test_sentencepiece_like_directory(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3, **{f"<0x{b:02X}>": 4 + b for b in range(256)}}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_hf_directory(tmp_path)
    for text in ("a a", " a", "é日😀", "a\n"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == backend.decode(ids) == text
    assert tokenizer.token_bytes(3) == b" a" and tokenizer.token_bytes(4 + 0xE9) == b"\xe9"


def test_damaged_directories(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        Tokenizer.from_hf_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_hf_directory(tmp_path)
    backend = train(tmp_path)
    (tmp_path / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"generation_config\.json is not valid JSON"):
        Tokenizer.from_hf_directory(tmp_path)
    write(tmp_path / "generation_config.json", [])
    with pytest.raises(ModelError, match="expected a JSON object"):
        Tokenizer.from_hf_directory(tmp_path)
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match=r"decoder .WordPiece. is not supported: expected ByteLevel"):
        Tokenizer(backend)


def test_round_trips(tokenizer: Tokenizer, spm_metadata: Mapping[str, Any], goldens: dict[str, Any]) -> None:
    spm = Tokenizer.from_gguf(spm_metadata)
    lost = {"\x04", "\x06", "\x13", "\x14", "\x16", "\x1d"}  # bytes the default model has no token for
    for text in goldens["texts"]:
        if "▁" not in text and "##" not in text:  # SentencePiece's space; a token after which it adds a space
            ids = spm.encode(text, add_special_tokens=False, parse_special=False)
            assert spm.decode(ids, skip_special_tokens=False) == text
        if lost.isdisjoint(text) and not any("\U00040000" <= char < "\U00100000" for char in text):
            assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_token_bytes_are_exact(tokenizer: Tokenizer) -> None:
    text = "naïve 😀<|im_end|>\n"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert tokenizer.token_bytes(2) == b"<|im_end|>"
    single = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
    assert {bytes([b]) for b in range(0x20, 0x7F)} <= single and b"\xe6" in single
    assert tokenizer.token_bytes(tokenizer.vocab_size) == tokenizer.token_bytes(-1) == b""
    assert tokenizer.decode([17, 10**6, 18]) == tokenizer.decode([17, 18])


def test_lone_surrogate_is_the_requests_fault(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"lone surrogate U\+D83D at position 3"):
        tokenizer.encode("abc\ud83d")


def test_imports_without_jax() -> None:
    modules = "tokenizer, gguf_tokenizer, chat_template, detokenizer"
    script = f"import sys; from llm_infer.text import {modules}; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    "config",
    [
        {"additional_special_tokens": ["<tool>"]},
        {"additional_special_tokens": [{"content": "<tool>", "lstrip": False}]},
        {"extra_special_tokens": {"tool_token": "<tool>"}},
        {"extra_special_tokens": ["<tool>", "<not there>"]},
        {"added_tokens_decoder": {"9": {"content": "<tool>", "special": True}}},
        {"sep_token": "<tool>"},
        {"mask_token": {"content": "<tool>"}},
    ],
    ids=lambda config: next(iter(config)),
)
def test_a_token_that_only_the_configuration_calls_special_is_left_out(
    tmp_path: Path, config: dict[str, object]
) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1, "<s>": 2}, merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_tokens([tokenizers.AddedToken("<tool>", rstrip=True, normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    plain = Tokenizer.from_hf_directory(tmp_path)
    assert plain.decode([0, 3, 1]) == "a<tool>b" and not plain.is_special(3)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    marked = Tokenizer.from_hf_directory(tmp_path)
    assert marked.decode([0, 3, 1]) == "ab" and marked.special_tokens == {"<tool>": 3}
    assert marked.encode("a<tool>  b") == plain.encode("a<tool>  b")  # still swallows the spaces behind it
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"additional_special_tokens": [3]}))
    with pytest.raises(ModelError, match="additional_special_tokens"):
        Tokenizer.from_hf_directory(tmp_path)
