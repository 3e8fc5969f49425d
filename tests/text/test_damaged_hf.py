"""Damaged files beside a tokenizer: one line that names the file and the entry, and no traceback of another kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_infer.base.errors import ModelError, RequestError
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.text.hf_files import guarded
from llm_infer.text.tokenizer import Tokenizer
from tests.text.test_tokenizer import train, write

DEEP = "[" * 100_000 + "]" * 100_000


def refused(directory: Path, name: str) -> None:
    with pytest.raises(ModelError) as caught:
        Tokenizer.from_hf_directory(directory)
    message = str(caught.value)
    assert name in message and "\n" not in message and len(message) < 500


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("config.json", {"eos_token_id": value}) for value in ("x", -1, 10**6, 10**30, 1.0, True, [1, "x"], {})),
        *(("generation_config.json", {"eos_token_id": value}) for value in (-1, [[1]], [1, 10**6])),
        *(("config.json", {"bos_token_id": value}) for value in ("x", -1, 10**30)),
        *(
            ("tokenizer_config.json", {"eos_token": value})
            for value in ("<nowhere>", 5, [], True, {"content": 5}, "\ud800")
        ),
        *(("tokenizer_config.json", {"bos_token": value}) for value in ("<nowhere>", ["<s>"], {"content": []})),
        *(("tokenizer_config.json", {"pad_token": value}) for value in (0, [])),
        *(("tokenizer_config.json", {"chat_template": value}) for value in (5, True, {}, ["x"], [{"name": "a"}], [{}])),
        ("tokenizer_config.json", {"chat_template": [{"name": [], "template": "x"}]}),
    ],
)
def test_values_that_cannot_be(tmp_path: Path, name: str, content: dict[str, Any]) -> None:
    train(tmp_path)
    write(tmp_path / name, content)
    refused(tmp_path, name)


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"],
)
def test_files_that_are_no_json(tmp_path: Path, name: str) -> None:
    train(tmp_path)
    for content in (
        DEEP.encode(),
        b'{"a": ' + DEEP.encode() + b"}",
        b"\xff\xfe",
        b"",
        b"[]",
        b'{"a": ' + b"9" * 9999 + b"}x",
    ):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path, name)


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/rag.jinja"])
def test_templates_that_are_not_utf8(tmp_path: Path, name: str) -> None:
    train(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"{{ '\xff' }}")
    refused(tmp_path, Path(name).name)


def test_ids_within_the_models_vocabulary_are_right_though_no_token_has_them(tmp_path: Path) -> None:
    size = train(tmp_path).get_vocab_size()
    write(tmp_path / "config.json", {"eos_token_id": [1, size + 5], "vocab_size": size + 10})
    assert Tokenizer.from_hf_directory(tmp_path).eos_token_ids == {1, size + 5}


def test_a_panic_of_the_library_is_the_models_error(tmp_path: Path) -> None:
    class PanicException(BaseException):
        """As the library's, which cannot be imported."""

    def panic() -> None:
        raise PanicException("index out of\nbounds")

    with pytest.raises(ModelError, match="damaged: index out of bounds"):
        guarded(panic, "damaged")
    with pytest.raises(KeyboardInterrupt):
        guarded(lambda: (_ for _ in ()).throw(KeyboardInterrupt()), "damaged")
    # A frame whose token is not described makes the library panic or raise when it encodes.
    train(tmp_path, frame=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["post_processor"]["special_tokens"] = {}
    write(tmp_path / "tokenizer.json", content)
    refused(tmp_path, "tokenizer")


@pytest.mark.parametrize("stop", ["\ud800", ["a", "b\udfff"], "x\udc00y"])
def test_half_a_surrogate_pair_is_no_stop_string(stop: Any) -> None:
    for name in ("stop", "bad_words"):
        with pytest.raises(RequestError, match=f"{name}=.*half a surrogate pair"):
            SamplingParams(**{name: stop})
