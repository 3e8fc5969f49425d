"""Models as values: LLM.from_model, models without a tokenizer, rollouts as arrays, and whose log-probabilities are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from llm_infer import LLM, SamplingParams, StructuredOutputsParams, load_model
from llm_infer.base.errors import ModelError, RequestError, UserError
from llm_infer.checkpoints import export_hf, fuse, hf_tensors, save, unfuse
from llm_infer.functional import unpacked_mask
from llm_infer.models.new_weights import weights_digest, with_weights
from llm_infer.text.byte_tokenizer import byte_tokenizer
from tests.engine.engines import without_clock
from tests.models.family_checkpoints import FOLDER, golden, load

NAME = "qwen3_gqa"
ENGINE = {"num_pages": 80, "max_num_seqs": 8, "max_num_batched_tokens": 32, "progress": False}
PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13]]


def tiny(weights: str = "stored", name: str = NAME) -> LLM:
    return LLM.from_model(
        load_model(FOLDER / name, weights=weights, skip_tokenizer_init=True, progress=False), **ENGINE
    )


def test_a_model_is_served_as_it_is_by_name() -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    expected = golden(NAME)
    for llm in (tiny(), tiny("dense"), LLM(FOLDER / NAME, skip_tokenizer_init=True, **ENGINE)):
        found = llm.generate(expected.prompts, greedy)
        for one, tokens in zip(found, expected.tokens, strict=True):
            assert one.outputs[0].token_ids == tokens[:8] and one.outputs[0].text == ""
    for name, value in {"dtype": "float32", "tp": 2, "tensor_parallel_size": 2}.items():
        with pytest.raises(UserError, match="no setting" if name == "tp" else "the model has decided that"):
            LLM.from_model(load(NAME), **{name: value})
    with pytest.raises(UserError, match="max_model_len=100000"):
        LLM.from_model(load(NAME), max_model_len=100000)


def test_token_ids_alone_suffice() -> None:
    llm = tiny()
    assert llm.tokenizer.eos_token_ids and llm.rollout(PROMPTS, SamplingParams(max_tokens=2)).texts == ["", ""]
    with pytest.raises(RequestError, match="no tokenizer"):
        llm.generate("hi")
    for name, value in {"stop": ["x"], "structured_outputs": StructuredOutputsParams(regex="a+")}.items():
        with pytest.raises(RequestError, match=f"{name} needs texts"):
            llm.generate(PROMPTS, SamplingParams(**{name: value}))
    named = LLM.from_model(llm.engine.runner.model, tokenizer=byte_tokenizer(llm.engine.vocab_size), **ENGINE)
    assert named.generate("ab", SamplingParams(temperature=0.0, max_tokens=2))[0].outputs[0].text


def test_rollouts_are_what_generate_returns() -> None:
    llm = tiny()
    params = [
        SamplingParams(temperature=0.9, n=3, seed=1, max_tokens=9, logprobs=2),
        SamplingParams(temperature=0.7, n=2, seed=2, max_tokens=4, logprobs=1, ignore_eos=True),
    ]
    found, expected = llm.rollout(PROMPTS, params), llm.generate(PROMPTS, params)
    rows = [(i, one, sample) for i, one in enumerate(expected) for sample in one.outputs]
    assert found.token_ids.shape == (5, 16) and found.top_ids.shape == (5, 16, 2)
    assert found.prompt_index.tolist() == [i for i, *_ in rows]
    for row, (_, one, sample) in enumerate(rows):
        start, end = len(one.prompt_token_ids), len(one.prompt_token_ids) + len(sample.token_ids)
        assert found.token_ids[row, :end].tolist() == one.prompt_token_ids + sample.token_ids
        assert not found.token_ids[row, end:].any() and found.lengths[row] == end and found.prompt_lengths[row] == start
        assert found.mask[row].nonzero()[0].tolist() == list(range(start, end))
        assert found.finish_reasons[row] == sample.finish_reason and found.weights_versions[row] == ("update-0",)
        for place, (token, at) in enumerate(zip(sample.token_ids, sample.logprobs or (), strict=True), start):
            assert found.logprobs[row, place] == np.float32(at[token].logprob)
            asked = params[found.prompt_index[row]].logprobs or 0
            for rank in range(asked):
                top = int(found.top_ids[row, place, rank])
                assert found.top_logprobs[row, place, rank] == np.float32(at[top].logprob)
                assert at[top].rank == rank + 1
            assert (found.top_logprobs[row, place, asked:] == -np.inf).all()
    assert llm.rollout(PROMPTS, params, pad_to=20).token_ids.shape == (5, 20)
    assert not llm.rollout(PROMPTS[0], SamplingParams(max_tokens=1)).top_ids.size


def test_models_that_cannot_be_served() -> None:
    model = load_model(FOLDER / NAME, weights="dense", skip_tokenizer_init=True, progress=False)
    on_host = model.with_params({name: np.asarray(value) for name, value in model.params.items()})
    greedy = SamplingParams(temperature=0.0, max_tokens=4)
    found, expected = (LLM.from_model(each, **ENGINE).rollout(PROMPTS, greedy) for each in (on_host, model))
    assert (found.token_ids == expected.token_ids).all()
    gone = {name: jnp.copy(value) for name, value in model.params.items()}
    gone["final_norm.weight"].delete()
    for message, params in {
        "final_norm.weight was deleted": gone,
        "the model has no embed.weight": {name: v for name, v in model.params.items() if name != "embed.weight"},
    }.items():
        with pytest.raises(ModelError, match=message):
            LLM.from_model(model.with_params(params))
    with pytest.raises(UserError, match="expected a model that load_model has loaded"):
        LLM.from_model("smollm2")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="dtype=int32: expected a type of floating-point numbers"):
        dict(hf_tensors(model, dtype="int32"))


def test_rollouts_and_scores_refuse() -> None:
    llm = tiny()
    for message, run in {
        "pad_to=10: expected at least 14": lambda: llm.rollout(PROMPTS, SamplingParams(max_tokens=9), pad_to=10),
        "beam_width": lambda: llm.rollout(PROMPTS, SamplingParams(beam_width=2, max_tokens=3)),
        "logprobs=-1": lambda: llm.rollout(PROMPTS, SamplingParams(logprobs=-1)),
        "start=4: expected a place in the row": lambda: llm.score_tokens([[1, 2, 3]], start=4),
        r"start=\[1\]: expected a place in the row, one for all 2": lambda: llm.score_tokens([[1], [2]], start=[1]),
        "pad_to=2: expected at least 3": lambda: llm.score_tokens([[1, 2, 3]], pad_to=2),
    }.items():
        with pytest.raises(RequestError, match=message):
            run()


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.sweep), 4])  # whose first step is a single one
def test_log_probabilities_of_the_distribution_that_is_drawn_from(steps: int) -> None:
    """Against NumPy: a bias and a penalty, the temperature, then what top-k and top-p leave; the same tokens as without."""
    shaped = dict(temperature=0.7, top_k=6, top_p=0.8, logit_bias={40: 2.0}, presence_penalty=0.5)
    params = [
        SamplingParams(max_tokens=6, seed=3, ignore_eos=True, logprobs=5, kept_tokens=bool(more["temperature"]), **more)
        for more in (shaped, {"temperature": 0.0})
    ]
    model = load_model(FOLDER / NAME, skip_tokenizer_init=True, progress=False)
    raw = LLM.from_model(model, num_scheduler_steps=steps, **ENGINE).rollout(PROMPTS, params)
    llm = LLM.from_model(model, num_scheduler_steps=steps, logprobs_mode="processed_logprobs", **ENGINE)
    found = llm.rollout(PROMPTS, params)
    assert (found.token_ids == raw.token_ids).all() and (found.mask == raw.mask).all()
    assert found.kept is not None and raw.kept is not None
    np.testing.assert_array_equal(found.kept, raw.kept)
    bits = np.asarray(unpacked_mask(found.kept, model.config.vocab_size))
    assert bits[1].all() and bits[0][~found.mask[0]].all()
    np.testing.assert_array_equal(found.logprobs[1], raw.logprobs[1])  # nothing is drawn of a greedy row
    every = LLM.from_model(model, **ENGINE).generate(PROMPTS[0], replace(params[0], logprobs=-1))[0].outputs[0]
    for step, (token, at) in enumerate(zip(every.token_ids, every.logprobs or (), strict=True)):
        values = np.array([at[i].logprob for i in range(len(at))], np.float64)
        values[40] += 2.0
        values[list({*every.token_ids[:step]})] -= 0.5
        values /= 0.7
        order = np.argsort(-values)[:6]
        mass = np.exp(values[order] - values[order[0]])
        kept = order[: 1 + int(np.searchsorted(np.cumsum(mass) / mass.sum(), 0.8))]
        expected = np.log(np.exp(values - values[order[0]]) / np.exp(values[kept] - values[order[0]]).sum())
        place = len(PROMPTS[0]) + step
        assert found.token_ids[0, place] == token and token in kept
        assert set(np.flatnonzero(bits[0, place]).tolist()) == set(kept.tolist())
        np.testing.assert_allclose(found.logprobs[0, place], expected[token], atol=1e-4)
        tops = found.top_logprobs[0, place]
        assert np.isfinite(tops).sum() == min(5, len(kept))
        np.testing.assert_allclose(tops[np.isfinite(tops)], expected[kept[:5]], atol=1e-4)


def test_models_go_out_and_come_back(tmp_path: Path) -> None:
    model = load_model(FOLDER / NAME, weights="dense", skip_tokenizer_init=True, progress=False)
    digest = weights_digest(model.params)
    export_hf(model, tmp_path / "hf", progress=False)
    save(model, tmp_path / "orbax", progress=False)
    for folder in ("hf", "orbax"):
        again = load_model(tmp_path / folder, weights="dense", skip_tokenizer_init=True, progress=False)
        assert weights_digest(again.params) == digest
    apart = unfuse(model)
    assert "layers.attn.q.weight" in apart.params and weights_digest(fuse(apart).params) == digest
    tokens = LLM.from_model(apart, **ENGINE).generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=4))
    assert (
        tokens[0].outputs[0].token_ids
        == tiny().generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=4))[0].outputs[0].token_ids
    )
    with pytest.raises(ModelError, match="in blocks of its file: load the model with weights='dense'"):
        save(load_model(FOLDER / NAME, skip_tokenizer_init=True, progress=False), tmp_path / "no", progress=False)


@pytest.mark.parametrize("name", ["gpt_oss_gqa", "qwen2_moe_gqa"])
def test_exported_tensors_are_new_weights(name: str) -> None:
    model = load(name)
    zeros = with_weights(model, {each: value * 0 for each, value in model.params.items()})
    assert weights_digest(with_weights(zeros, hf_tensors(model)).params) == weights_digest(model.params)


def test_a_draft_model_gets_new_weights_too() -> None:
    """The model itself drafts: all that it proposes is right, until only one of the two has other weights."""
    model = load_model(FOLDER / NAME, weights="dense", skip_tokenizer_init=True, progress=False)
    drafts = {"method": "draft_model", "model": str(FOLDER / NAME), "num_speculative_tokens": 3}
    few = ENGINE | {"max_num_seqs": 1, "max_num_batched_tokens": 8}
    llm = LLM.from_model(model, speculative_config=drafts, **few)
    without_clock(llm.engine)
    others = {name: value * 0.7 for name, value in model.params.items()}
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=12, ignore_eos=True)
    expected = LLM.from_model(replace(model, params=others), **few).generate(PROMPTS[:1], params)[0].outputs[0]
    shares = []
    for draft in (None, others):
        llm.update_weights(others, draft=draft)
        (found,) = llm.generate(PROMPTS[:1], params)
        assert found.outputs[0].token_ids == expected.token_ids and found.metrics is not None
        shares.append(found.metrics.num_accepted_tokens / found.metrics.num_drafted_tokens)
    assert shares[0] < 1 == shares[1]
    with pytest.raises(UserError, match="this LLM has no draft model"):
        tiny().update_weights(others, draft=others)
