"""Pages of int8: the same tokens in any mix of features, half the memory, and a word where there are none."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from llm_infer import LLM
from llm_infer.base.errors import UserError
from llm_infer.commands.app import app
from llm_infer.config import CacheConfig, EngineConfig
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.memory import page_dtype
from llm_infer.engine.page_count import page_bytes
from llm_infer.engine.step.state import PAGES
from llm_infer.models.load import LoadedModel, dummy_model
from tests.engine.engines import EngineFactory, run_all, without_clock
from tests.engine.test_speculation import CONFIG, COUNT, LENGTH, NGRAM, requests


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return dummy_model(CONFIG, seed=3)


def factory(model: LoadedModel, dtype: str | None = "int8") -> EngineFactory:
    return EngineFactory(model, max_num_seqs=8, num_pages=64, max_model_len=LENGTH, page_dtype=dtype)


@pytest.mark.parametrize("kernels", ["cpu", "xla"])
def test_tokens_do_not_depend_on_company(model: LoadedModel, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and drawn ones, with copied pages, preemption, prefixes in the cache, short chunks, proposals and beams."""
    monkeypatch.setenv("LLM_INFER_KERNELS", f"paged_attention={kernels},copy_pages={kernels}")
    make_engine, (prompts, params) = factory(model), requests()
    beams = partial(SamplingParams, temperature=0.0, max_tokens=COUNT, ignore_eos=True, beam_width=3)
    prompts, params = [*prompts, prompts[3]], [*params, beams()]
    alone = make_engine(chunk=32, cache=False, overlap=False)
    expected = [run_all(alone, [prompt], [param])[0] for prompt, param in zip(prompts, params, strict=True)]
    pool = alone.runner.state.cache[PAGES]
    assert pool.dtype == jnp.uint8 and pool.shape[-1] == CONFIG.head_dim + 4
    for chunk, pages, overlap, speculative in ((8, 64, True, None), (32, 10, True, NGRAM), (8, 9, False, None)):
        engine = make_engine(chunk=chunk, pages=pages, overlap=overlap, speculative=speculative)
        without_clock(engine)
        for _ in range(2):
            assert run_all(engine, prompts, params) == expected
        assert engine.scheduler.num_copied_pages > 0 and (pages == 64 or engine.scheduler.num_preemptions > 0)


def test_native_and_xla_kernels_draw_the_same_tokens(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for kernels in ("cpu", "xla"):
        monkeypatch.setenv("LLM_INFER_KERNELS", f"paged_attention={kernels}")
        found.append(run_all(factory(model)(chunk=32), *requests()))
    assert found[0] == found[1]


def test_a_page_takes_a_byte_for_each_number_and_four_for_a_scale(model: LoadedModel) -> None:
    heads = CONFIG.num_layers * 2 * CONFIG.num_kv_heads
    assert page_bytes(factory(model)().runner.step_programs) == heads * 16 * (CONFIG.head_dim + 4)


@pytest.mark.real
def test_llm_and_the_command_line_take_it(default_gguf: Path) -> None:
    llm = LLM(str(default_gguf), max_model_len=64, max_num_seqs=1, kv_cache_dtype="int8", progress=False)
    greedy = SamplingParams(temperature=0.0, max_tokens=12)
    text = llm.generate("The capital of France is", greedy)[0].outputs[0].text
    assert text.startswith(" Paris") and llm.engine.runner.state.cache[PAGES].dtype == jnp.uint8
    flags = ["-m", str(default_gguf), "-n", "12", "--temp", "0", "-c", "64", "--raw", "--kv-cache-dtype", "int8"]
    done = CliRunner().invoke(app, ["generate", "-p", "The capital of France is", *flags])
    assert done.exit_code == 0 and text.strip() in done.output, done.output


def test_other_platforms_have_none(model: LoadedModel) -> None:
    config = EngineConfig(CacheConfig(num_pages=8, dtype="int8"))
    assert page_dtype(model, config, "cpu") == jnp.int8
    for platform in ("gpu", "tpu"):
        with pytest.raises(UserError, match=f"expected a CPU.*found {platform}: use auto or bfloat16"):
            page_dtype(model, config, platform)
