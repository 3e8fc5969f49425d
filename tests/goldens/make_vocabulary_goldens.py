"""Writes vocabularies_llamacpp.json: digests of the ids that llama.cpp gives for published vocabularies.

The directory holds ggml-vocab-*.gguf, which are not committed; the texts are those of tokenizer_llamacpp.json.

Run where llama-cpp-python, gguf and tokenizers are installed:
    python tests/goldens/make_vocabulary_goldens.py DIRECTORY
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import llama_cpp
from make_tokenizer_goldens import run_llamacpp

SETTINGS = ((True, True), (False, False))
"""(add_special, parse_special) of each text."""


def digest(ids: list[int]) -> str:
    """Six characters that stand for the ids."""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:6]


def main() -> None:
    """Writes the goldens beside this file."""
    here = Path(__file__)
    texts = json.loads(here.with_name("tokenizer_llamacpp.json").read_text(encoding="utf-8"))["texts"]
    vocabularies = {}
    for file in sorted(Path(sys.argv[1]).glob("ggml-vocab-*.gguf")):
        found = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for setting in SETTINGS:
            result = run_llamacpp(file, texts, [setting])
            found["eos"] = result["eos"]
            found[" ".join(map(str, setting))] = " ".join(digest(case[3]) for case in result["cases"])
        vocabularies[file.stem.removeprefix("ggml-vocab-")] = found
    source = {"llama_cpp_python": llama_cpp.__version__}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in vocabularies.items())
    text = f'{{"source": {json.dumps(source)},\n"vocabularies": {{\n{lines}}}}}\n'
    here.with_name("vocabularies_llamacpp.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
