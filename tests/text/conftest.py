"""Fixtures of the text layer: the default model's tokenizer and the ids llama.cpp gives."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llm_infer.text.tokenizer import Tokenizer
from llm_infer.weights.gguf import GGUFFile


@pytest.fixture(scope="session")
def gguf_metadata(default_gguf: Path) -> Mapping[str, object]:
    """Metadata of the default model's file."""
    return GGUFFile(default_gguf).metadata


@pytest.fixture(scope="session")
def tokenizer(gguf_metadata: Mapping[str, object]) -> Tokenizer:
    """The default model's tokenizer."""
    return Tokenizer.from_gguf(gguf_metadata)


@pytest.fixture(scope="session")
def goldens() -> dict[str, Any]:
    """tests/goldens/tokenizer_llamacpp.json, see make_tokenizer_goldens.py beside it."""
    path = Path(__file__).parents[1] / "goldens" / "tokenizer_llamacpp.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def spm_metadata(goldens: dict[str, Any]) -> dict[str, object]:
    """A tiny SentencePiece vocabulary as GGUF metadata."""
    return goldens["vocabularies"]["spm"]


@pytest.fixture(scope="session")
def bpe_metadata(goldens: dict[str, Any]) -> dict[str, object]:
    """A tiny byte-level vocabulary as GGUF metadata; four bytes have no token."""
    return goldens["vocabularies"]["bpe"]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Published templates and vocabularies, which the repository holds no copy of: from LLM_INFER_TEST_DATA, else beside it."""
    given = os.environ.get("LLM_INFER_TEST_DATA")
    path = Path(given) if given else Path(__file__).parents[3] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"{path} is not there: set LLM_INFER_TEST_DATA to a directory with templates/ and vocab/")
    return path
