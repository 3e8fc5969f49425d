"""Every family gives transformers' numbers: hidden states, logits and greedy tokens, dense and through the paged engine."""

from __future__ import annotations

import numpy as np
import pytest

from llm_infer.config import CacheConfig, EngineConfig, SchedulerConfig
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.engine import Engine
from llm_infer.engine.runner import PendingStep, Runner
from llm_infer.scheduler.plan import StepPlan
from tests.models.family_checkpoints import NAMES, dense, golden, load

TOLERANCE = 1e-4  # absolute; logits and hidden states are of size 1 to 10
BFLOAT16_TOLERANCE = 0.012  # root mean square of the error by that of the logits; docs/precision.md has the figures
MORE_IN_BFLOAT16 = {
    "gemma3_gqa": 0.0135,
    "gemma3_mha": 0.027,
    "glm4_moe_gqa": 0.225,  # rounding sends a token to another expert, in transformers, too
    "lfm2_gqa": 0.037,
    "lfm2_mha": 0.015,
    "lfm2_moe_gqa": 0.022,
    "minimax_m2_gqa": 0.051,  # so here; transformers' loses 0.0090
}  # what transformers' own bfloat16 loses: 0.0132, 0.0263, 0.2225, 0.0335, 0.0121, 0.0197


PAGES = 48  # enough where layers with windows have pages of their own
SWEEP = pytest.mark.sweep  # compiling takes nearly all of the time, so only a part of the product runs always


def cases(first: object, second: object) -> list:
    """Every checkpoint with both values; always run are one shape of each family with the first, and one with both."""
    short = [(name, first) for name in NAMES if name.endswith(("gqa", "pre"))] + [("llama_gqa", second)]
    return [
        pytest.param(name, value, marks=[] if (name, value) in short else SWEEP)
        for name in NAMES
        for value in (first, second)
    ]


@pytest.mark.parametrize(("name", "fused_qkv"), cases(True, False))
def test_hidden_states_and_logits(name: str, fused_qkv: bool) -> None:
    expected = golden(name)
    logits, hidden = dense(load(name, fused_qkv=fused_qkv), expected.prompts[0])
    np.testing.assert_allclose(hidden, expected.hidden, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(logits, expected.logits[0], atol=TOLERANCE, rtol=0)


def run_engine(name: str, *, bucket: int, fused_qkv: bool) -> tuple[list[list[int]], list[np.ndarray]]:
    """Greedy tokens of both prompts in one batch, and each prompt's last logits, with steps of at most `bucket` tokens."""
    expected = golden(name)
    config = EngineConfig(
        CacheConfig(page_size=8, num_pages=PAGES),
        SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=bucket, max_model_len=48),
        check_every_step=True,
    )
    engine = Engine(load(name, fused_qkv=fused_qkv), config)
    runner = engine.runner = Runner(engine.runner.model, config, num_pages=PAGES, max_model_len=48, keep_logits=True)
    runner.buckets = type(runner.buckets)([bucket])  # one program to compile
    requests = [
        engine.add_request(ids, SamplingParams(temperature=0.0, max_tokens=len(tokens), ignore_eos=True))
        for ids, tokens in zip(expected.prompts, expected.tokens, strict=True)
    ]
    last: dict[int, np.ndarray] = {}
    submit = runner.submit

    def keep_last_logits(plan: StepPlan) -> PendingStep:
        pending = submit(plan)
        logits = pending.read()["logits"][0]
        for row, values in zip(plan.rows[0], logits, strict=False):
            if row.samples:
                last.setdefault(requests.index(row.sequence.request), values)
        return pending

    runner.submit = keep_last_logits  # type: ignore[method-assign]
    while engine.has_work:
        engine.step()
    return [request.sequences[0].output for request in requests], [last[0], last[1]]


# Whole prompts (30 tokens) in one step; chunks of 6 tokens that both end inside pages of 8 and cross them.
@pytest.mark.parametrize(("name", "bucket"), cases(6, 32))
def test_paged_engine(name: str, bucket: int) -> None:
    expected = golden(name)
    outputs, last = run_engine(name, bucket=bucket, fused_qkv=bucket == 6)
    assert outputs == expected.tokens
    for found, logits in zip(last, expected.logits, strict=True):
        np.testing.assert_allclose(found, logits[-1], atol=TOLERANCE, rtol=0)


def check_bfloat16(found: np.ndarray, expected: np.ndarray, tolerance: float = BFLOAT16_TOLERANCE) -> None:
    error = float(np.sqrt(np.mean((found - expected) ** 2)) / expected.std())
    print(f"bfloat16: relative error {error:.4f}, largest {np.abs(found - expected).max():.4f}")
    assert found.dtype == np.float32 and error < tolerance


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("qwen3_moe_gqa", "opt_post") else SWEEP) for n in NAMES]
)
def test_bfloat16(name: str) -> None:
    expected = golden(name)
    found, _ = dense(load(name, dtype="bfloat16"), expected.prompts[0])
    check_bfloat16(found, expected.logits[0], MORE_IN_BFLOAT16.get(name, BFLOAT16_TOLERANCE))
