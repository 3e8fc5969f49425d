"""Loads damaged copies of tiny models, in a process of its own with bounds on memory and time; prints what came of them."""

from __future__ import annotations

import faulthandler
import json
import random
import resource
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
from gguf import GGUFValueType
from safetensors.numpy import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from llm_infer.base.errors import UserError
from llm_infer.base.progress import Progress
from llm_infer.loading import convert, load
from llm_infer.weights.orbax_checkpoint import MANIFEST
from llm_infer.weights.safetensors_files import INDEX_NAME
from tests.weights.mutations import mutate_bytes, mutate_json, mutate_safetensors
from tests.weights.tiny_models import CONFIG, V, hf_tensors, write_gguf

SECONDS, BYTES, LONGEST = 10, 4 << 30, 850
_JSON = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", INDEX_NAME, "chat_template.jinja"),
)


def main(kind: str, count: int) -> None:
    """Prints a line for each fault, and at the end the counts of loaded and refused."""
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    loaded = refused = 0
    with tempfile.TemporaryDirectory() as folder:
        good = _write(kind, Path(folder))
        assert _outcome(good) is None, _outcome(good)
        bad = Path(folder) / "bad"
        for seed in range(count):
            rng = random.Random(f"{kind} {seed}")
            if good.is_file():
                bad.write_bytes(mutate_bytes(good.read_bytes(), rng, 4000))
            else:
                shutil.copytree(good, bad)
                _damage(kind, bad, rng)
            print(f"seed {seed}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            try:
                problem = _outcome(bad)
            except BaseException:
                print(f"FAULT {kind} {seed}: {traceback.format_exc()[-900:]}", flush=True)
            else:
                loaded, refused = loaded + (problem is None), refused + (problem is not None)
                if problem is not None and ("\n" in problem or len(problem) > LONGEST):
                    print(f"FAULT {kind} {seed}: message of {len(problem)}: {problem[:900]}", flush=True)
            faulthandler.cancel_dump_traceback_later()
            bad.unlink() if bad.is_file() else shutil.rmtree(bad)
    print(json.dumps({"loaded": loaded, "refused": refused}), flush=True)


def _outcome(path: Path) -> str | None:
    """None if the model loads and its tokenizer works, else the message of the error for the user."""
    try:
        model = load(
            path, load_format="auto", fused_qkv=True, precision="exact", dtype="float32", progress=Progress.silent()
        )
        tokenizer = model.tokenizer
        assert tokenizer is not None
        ids = tokenizer.encode("a text: 1 é")
        assert isinstance(tokenizer.decode(ids), str)
        assert all(0 <= i < 1 << 31 for i in tokenizer.eos_token_ids)
        assert 0 < model.config.vocab_size < 1 << 31
    except UserError as error:
        return str(error)
    return None


def _damage(kind: str, directory: Path, rng: random.Random) -> None:
    if kind == "safetensors":
        file = directory / "weights.safetensors"
        file.write_bytes(mutate_safetensors(file.read_bytes(), rng))
    elif kind == "orbax":
        file = directory / MANIFEST
        file.write_bytes(mutate_json(file.read_bytes(), rng))
    else:
        file = directory / rng.choice(_JSON)
        change = (lambda data, rng: mutate_bytes(data, rng, len(data))) if file.suffix == ".jinja" else mutate_json
        file.write_bytes(change(file.read_bytes(), rng))


def _write(kind: str, folder: Path) -> Path:
    """An undamaged tiny model of this kind."""
    if kind == "gguf":
        extra = {
            "tokenizer.ggml.model": ("gpt2", GGUFValueType.STRING),
            "tokenizer.ggml.pre": ("smollm", GGUFValueType.STRING),
            "tokenizer.ggml.merges": (["t o", "e n"], GGUFValueType.ARRAY),
        }
        tokens = ["to", "en", "<s>", *(chr(97 + i) for i in range(V - 3))]
        return write_gguf(folder / "good", hf_tensors(), extra=extra, tokens=tokens)
    good = folder / "good"
    good.mkdir()
    tensors = hf_tensors()
    save_file(tensors, good / "weights.safetensors")
    backend = Backend(
        models.BPE(vocab={chr(97 + i): i for i in range(V - 4)} | {"<s>": V - 2, "</s>": V - 1}, merges=[])
    )
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(good / "tokenizer.json"))
    contents = {
        "config.json": CONFIG,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": [2], "temperature": 0.6},
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "eos_token": {"content": "</s>"},
            "chat_template": "{{ messages }}",
        },
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>"},
        INDEX_NAME: {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, "weights.safetensors")},
    }
    for name, content in contents.items():
        (good / name).write_text(json.dumps(content))
    (good / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}é{% endfor %}")
    return good if kind != "orbax" else convert(good, folder / "checkpoint")


if __name__ == "__main__":
    np.seterr(all="ignore")
    main(sys.argv[1], int(sys.argv[2]))
