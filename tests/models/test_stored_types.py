"""Every type of blocks computes what its weights compute in float32: logits and greedy tokens, alone, in batches, on a mesh."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llm_infer.config import CacheConfig, EngineConfig, SchedulerConfig
from llm_infer.engine.engine import Engine
from llm_infer.models.load import LoadedModel, compute_dtype, load_model
from llm_infer.models.opened import open_model
from llm_infer.quant import StoredWeights
from llm_infer.weights.sources import resolve
from tests.engine.engines import greedy
from tests.models.block_files import KINDS, write_llama
from tests.models.family_checkpoints import dense, dense_run

pytestmark = pytest.mark.skipif(compute_dtype("auto", "exact")[1] is None, reason="needs the native CPU kernels")
LENGTH = 24  # tokens of each prompt and its continuation
CLOSE_CALL = 1e-3  # between two logits: the last bits of sums may decide
BATCHES = (1, 8, 33)
ROOT = Path(__file__).parents[2]


def prompts(count: int, vocab: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, vocab, 3 + i % 11).tolist() for i in range(count)]


def check_likeliest(model: LoadedModel, texts: list[list[int]], starts: list[int]) -> None:
    """Checks that each token after a text's start is the likeliest one, or as likely up to CLOSE_CALL."""
    run = dense_run(model)
    for text, start in zip(texts, starts, strict=True):
        logits = run(text)[0][start - 1 : -1]
        chosen = np.take_along_axis(logits, np.array(text[start:])[:, None], 1)[:, 0]
        np.testing.assert_array_less(logits.max(-1) - chosen, CLOSE_CALL)


def check_engine(stored: LoadedModel, read: LoadedModel, batches: Sequence[int]) -> None:
    """Checks greedy tokens in batches of such sizes, which have different kernels and programs."""
    config = EngineConfig(CacheConfig(num_pages=128), SchedulerConfig(max(batches), 64, 64))
    engine, vocab = Engine(stored, config), stored.config.vocab_size
    for batch in batches:
        asked = prompts(batch, vocab)
        found = greedy(engine, asked, [LENGTH - len(prompt) for prompt in asked])
        checked = range(0, batch, 1 if batch < 9 else 4)
        texts = [asked[i] + found[i] for i in checked]
        check_likeliest(read, texts, [len(asked[i]) for i in checked])


def check(path: Path, fused: bool, batches: Sequence[int] = BATCHES) -> None:
    opened = open_model(resolve(str(path)))
    stored, read = load_model(opened, stored="exact", fused_qkv=fused), load_model(opened, fused_qkv=fused)
    up = stored.params["layers.mlp.up.weight"]
    assert isinstance(up, StoredWeights)
    for found, expected in zip(dense(stored, range(1, 32)), dense(read, range(1, 32)), strict=True):
        # Blocks of any bytes make large numbers, so the bound is a part of them.
        np.testing.assert_allclose(found, expected, atol=1e-4 * max(1.0, float(np.sqrt(np.mean(expected**2)))), rtol=0)
    check_engine(stored, read, batches)


def mixed(name: str) -> str:
    """A type for each matrix of a layer, all different from the next layer's, as far as KINDS goes."""
    return KINDS[sum(map(ord, name)) % len(KINDS)]


ALL = [pytest.param(*row, BATCHES, marks=pytest.mark.sweep) for row in itertools.product(KINDS, (True, False))]


@pytest.mark.parametrize(("kind", "fused", "batches"), [("Q4_K", True, (8,)), *ALL])
def test_one_type(tmp_path: Path, kind: str, fused: bool, batches: Sequence[int]) -> None:
    write_llama(tmp_path / "model.gguf", lambda _: kind, layers=3, width=512, ff=1536, vocab=320)
    check(tmp_path / "model.gguf", fused, batches)


@pytest.mark.sweep
def test_many_types_at_once(tmp_path: Path) -> None:
    write_llama(tmp_path / "model.gguf", mixed, layers=3, width=512, ff=1536, vocab=320)
    check(tmp_path / "model.gguf", fused=True)


CHILD = """
import sys
from collections.abc import Sequence
from pathlib import Path
from llm_infer.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from llm_infer.engine.engine import Engine
from llm_infer.models.load import load_model
from llm_infer.models.opened import open_model
from llm_infer.weights.sources import resolve
from tests.engine.engines import greedy
from tests.models.test_stored_types import LENGTH, prompts
import json
for path in sys.argv[1:]:
    model = load_model(open_model(resolve(path)), stored="exact", parallel=ParallelConfig(2))
    engine = Engine(model, EngineConfig(CacheConfig(num_pages=64), SchedulerConfig(8, 16, 64)))
    engine.runner.buckets = (16,)
    asked = prompts(8, model.config.vocab_size)
    print(json.dumps(greedy(engine, asked, [LENGTH - len(prompt) for prompt in asked])), flush=True)
"""


@pytest.mark.sweep
def test_every_type_over_two_devices(tmp_path: Path) -> None:
    """Rows of 1024 and 512 weights are cut into whole blocks."""
    paths = [tmp_path / f"{kind}.gguf" for kind in KINDS]
    for path, kind in zip(paths, KINDS, strict=True):
        write_llama(path, lambda _, kind=kind: kind, layers=2, width=512, ff=1024, vocab=320)
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, paths)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    for path, found in zip(paths, answers, strict=True):
        read = load_model(open_model(resolve(str(path))))
        asked = prompts(8, read.config.vocab_size)
        check_likeliest(read, [a + b for a, b in zip(asked, found, strict=True)], [len(a) for a in asked])
