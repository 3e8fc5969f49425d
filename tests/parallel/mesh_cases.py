"""Run by test_mesh in a process of its own: engines over meshes of eight fake CPU devices. Prints a line of JSON for each case.

Arguments are names of CASES. Each case compares an engine over a mesh with the tokens that transformers computed from the
same checkpoint, or with an engine on one device, and reports the collectives of its program.
"""

from __future__ import annotations

import os

# Machine code is optimised for nothing: the programs run for a moment, and collectives are decided before it is made.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import json
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_infer.base.errors import ModelError
from llm_infer.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig, SpeculativeConfig
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.engine import Engine
from llm_infer.models.config import ModelConfig, MoEConfig
from llm_infer.models.load import LoadedModel, compute_dtype, dummy_model, load_model, save_model
from llm_infer.models.new_weights import weights_digest, with_weights
from llm_infer.models.opened import open_model
from llm_infer.models.params import split_model
from llm_infer.quant import StoredWeights
from llm_infer.weights.default_model import DEFAULT_MODEL
from llm_infer.weights.sources import resolve
from tests.engine.engines import greedy, run_all, without_clock
from tests.golden_tokens import assert_same_tokens, load_goldens
from tests.models.family_checkpoints import FOLDER, dense, golden
from tests.parallel.hlo import collectives

ONE = ParallelConfig()
MARGIN = 2e-3  # between the two best tokens; below it, the last bit of a sum may decide
BUCKET = 16
SPECULATIVE = {
    "ngram": SpeculativeConfig(num_speculative_tokens=3, prompt_lookup_min=1),
    "draft_model": SpeculativeConfig("draft_model", 3, model="first layer"),
}


def llama(heads: int, kv_heads: int) -> ModelConfig:
    return ModelConfig("LlamaForCausalLM", 131, 32, 2, heads, kv_heads, 16, 64, 256, tie_word_embeddings=True)


MOE = ModelConfig("Qwen3MoeForCausalLM", 131, 32, 2, 4, 2, 16, 1, 256, qk_norm=True, moe=MoEConfig(8, 2, 32))
DUMMIES = {"llama 8/8": llama(8, 8), "llama 8/2": llama(8, 2), "moe 4/2": MOE}


@dataclass(frozen=True)
class Case:
    """A model, a mesh (dp, tp, ep), and what the engine is to do."""

    model: str
    mesh: tuple[int, int, int]
    load: dict[str, Any] = field(default_factory=dict)
    draw: dict[str, Any] = field(default_factory=dict)
    pages: int = 64
    rounds: int = 1
    speculative: str | None = None
    steps: int = 1
    page_dtype: str | None = None


CASES = {
    **{f"8/8 on {m[0]}x{m[1]}": Case("llama 8/8", m) for m in ((8, 1, 1), (1, 8, 1), (2, 4, 1))},
    **{f"8/2 on {m[0]}x{m[1]}": Case("llama_gqa", m) for m in ((8, 1, 1), (1, 8, 1), (2, 4, 1))},
    "moe on 2x2x2": Case("qwen3_moe_gqa", (2, 2, 2)),
    "wide experts on 1x2x2": Case("moe 4/2", (1, 2, 2)),
    "opt on 2x4": Case("opt_pre", (2, 4, 1)),
    "qwen2 with biases on 1x8": Case("qwen2_gqa", (1, 8, 1)),
    "unfused on 1x4": Case("qwen3_gqa", (1, 4, 1), {"fused_qkv": False}),
    "converted on 1x8": Case("llama_gqa", (1, 8, 1), {"converted": True}),
    "gemma3 on 2x4": Case("gemma3_gqa", (2, 4, 1)),
    "gpt-oss on 2x2x2": Case("gpt_oss_gqa", (2, 2, 2)),
    "minimax on 2x2x2": Case("minimax_m2_gqa", (2, 2, 2)),
    "glm-4.5 on 2x2x2": Case("glm4_moe_gqa", (2, 2, 2)),
    "lfm2 on 2x4": Case("lfm2_gqa", (2, 4, 1)),
    "lfm2-moe on 2x2x2": Case("lfm2_moe_gqa", (2, 2, 2)),
    "lfm2 sampled, cached on 2x2": Case("lfm2_gqa", (2, 2, 1), draw=dict(temperature=1.0, n=2), rounds=2),
    "olmo2 on 1x8": Case("olmo2_gqa", (1, 8, 1)),
    "native kernels on 2x2": Case("llama 8/8", (2, 2, 1), {"stored": "exact"}),
    "sampled, preempted, cached on 2x4": Case(
        "llama 8/2", (2, 4, 1), draw=dict(temperature=1.0, top_p=0.95, n=2), pages=7, rounds=2
    ),
    "penalties on 4x2": Case("llama 8/2", (4, 2, 1), draw=dict(repetition_penalty=1.3, presence_penalty=0.5)),
    "beams on 2x4": Case("llama 8/2", (2, 4, 1), draw=dict(beam_width=3)),
    "speculation on 2x4": Case("llama 8/2", (2, 4, 1), speculative="ngram"),
    "draft model on 2x2": Case("llama 8/2", (2, 2, 1), draw=dict(temperature=1.0), speculative="draft_model"),
    "int8 pages on 2x2": Case("llama 8/8", (2, 2, 1), {"stored": "exact"}, page_dtype="int8"),
    "several steps on 2x4": Case("llama 8/2", (2, 4, 1), steps=4),
}


def load(name: str, parallel: ParallelConfig, *, converted: bool = False, **options: Any) -> LoadedModel:
    if converted:  # through a checkpoint, whose parameters are mapped files
        with tempfile.TemporaryDirectory() as folder:
            save_model(load(name, ONE, **options), folder, {})
            return load_model(open_model(resolve(folder)), parallel=parallel, **options)
    if name in DUMMIES:
        return dummy_model(DUMMIES[name], seed=3, parallel=parallel, **options)
    return load_model(open_model(resolve(str(FOLDER / name))), parallel=parallel, **options)


def prompts(vocab: int) -> list[list[int]]:
    """Ragged lengths around page boundaries, some with a common beginning of two pages and a bit."""
    rng = np.random.default_rng(5)
    shared = rng.integers(1, vocab, 37).tolist()
    own = [rng.integers(1, vocab, n).tolist() for n in (1, 2, 15, 16, 17, 33)]
    return own + [shared + rng.integers(1, vocab, n).tolist() for n in (1, 5, 11)]


@cache
def load_plain(name: str, options: str) -> LoadedModel:
    """The model on one device; `options` are JSON."""
    return load(name, ONE, **json.loads(options))


@cache
def on_one_device(model: str, load_options: str, draw_options: str, page_dtype: str | None) -> list[list[list[int]]]:
    """Tokens of the dummy model's prompts by a plain engine."""
    case = Case(model, (1, 1, 1), json.loads(load_options), page_dtype=page_dtype)
    plain = load_plain(model, load_options)
    return run_all(engine(plain, case, 64), prompts(plain.config.vocab_size), parameters(json.loads(draw_options)))


def parameters(draw: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "seed": 7} | draw)


def engine(model: LoadedModel, case: Case, pages: int) -> Engine:
    config = EngineConfig(
        CacheConfig(num_pages=pages, dtype=case.page_dtype),
        SchedulerConfig(8, BUCKET, min(96, model.config.max_position_embeddings), num_scheduler_steps=case.steps),
        check_every_step=True,
        speculative=None if case.speculative is None else SPECULATIVE[case.speculative],
    )
    made = Engine(model, config, draft_model=first_layer(model) if case.speculative == "draft_model" else None)
    made.runner.buckets = (BUCKET,)  # one program
    if made._draft_model is not None:
        made._draft_model.runner.buckets = (BUCKET,)
        without_clock(made)
    return made


def first_layer(model: LoadedModel) -> LoadedModel:
    """A draft model that is right now and then: the target's first layer only, on the same mesh."""
    small = replace(model.config, num_layers=1)
    params = {
        name: array if name.startswith(("embed", "final")) else jax.device_put(array[:1], array.sharding)
        for name, array in model.params.items()
    }
    return replace(model, config=small, definition=split_model(small, "float32")[0], params=params)


def forced_steps(plain: LoadedModel, sharded: Engine, prompt: list[int], wanted: list[int]) -> int | None:
    """How often greedy decoding leaves `wanted` where two tokens are within MARGIN and is led back; None if elsewhere."""
    forced, done = 0, 0
    while done < len(wanted):
        params = SamplingParams(temperature=0.0, max_tokens=len(wanted) - done, ignore_eos=True)
        ((found,),) = run_all(sharded, [prompt + wanted[:done]], params)
        if found == wanted[done:]:
            break
        done += next(i for i, (a, b) in enumerate(zip(found, wanted[done:], strict=True)) if a != b)
        logits, _ = dense(plain, prompt + wanted[:done])
        first, second = np.sort(logits[-1])[:-3:-1]
        if first - second >= MARGIN:
            return None
        forced, done = forced + 1, done + 1
    return forced


def device_bytes(model: LoadedModel) -> list[int]:
    """Bytes of the parameters on each device."""
    shards = [shard for leaf in jax.tree.leaves(model.params) for shard in leaf.addressable_shards]
    counts = Counter[Any]()
    for shard in shards:
        counts[shard.device.id] += shard.data.nbytes
    return list(counts.values())


def takes_weights(model: LoadedModel, plain: LoadedModel) -> bool:
    """Tells whether a cut model that forgot its weights and is given those of one device has those that it was loaded with."""
    empty = replace(model, params=jax.tree.map(lambda x: jax.device_put(jnp.zeros_like(x), x.sharding), model.params))
    dense = {
        name: value.blocks[0] if isinstance(value, StoredWeights) else value for name, value in plain.params.items()
    }
    given = {name: value[0] if name == "embed.weight" and value.ndim == 3 else value for name, value in dense.items()}
    found, wanted = with_weights(empty, given).params, model.params
    assert all(a.sharding == b.sharding for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))
    kept = with_weights(empty, wanted).params  # as they are cut
    for name, value in wanted.items():
        shape = value.shape
        if not isinstance(value, StoredWeights) and shape != plain.params[name].shape:
            try:  # whole parameters alone are arranged
                with_weights(model, {name: np.asarray(value)})
            except ModelError:
                continue
            return False
    return weights_digest(found) == weights_digest(wanted) == weights_digest(kept)


def run(case: Case) -> dict[str, Any]:
    dp, tp, ep = case.mesh
    started = time.process_time()
    model = load(case.model, ParallelConfig(tp, dp, ep), **case.load)
    plain = load_plain(case.model, json.dumps(case.load))
    draw = parameters(case.draw)
    sharded = engine(model, case, case.pages)
    if case.model in DUMMIES or case.draw:
        texts = prompts(model.config.vocab_size)
        wanted = on_one_device(case.model, json.dumps(case.load), json.dumps(case.draw), case.page_dtype)
    else:
        texts = golden(case.model).prompts
        wanted = [[tokens[: draw.max_tokens]] for tokens in golden(case.model).tokens]
        draw = replace(draw, max_tokens=len(wanted[0][0]))
    for _ in range(case.rounds):
        found = run_all(sharded, texts, draw)
    forced: list[int | None] = []
    if found != wanted and not case.draw:
        forced = [forced_steps(plain, sharded, text, each[0]) for text, each in zip(texts, wanted, strict=True)]
    programs = list(sharded.runner._programs.values())
    inside, outside, gathered = collectives(programs[0].run.as_text())
    others = [collectives(program.run.as_text()) for program in programs[1:]]
    return {
        "same": found == wanted or (bool(forced) and None not in forced),
        "forced": sum(each or 0 for each in forced),
        "inside": inside,
        "outside": outside,
        "gathered": gathered,
        "others": [inside + outside for inside, outside, _ in others],
        "logits": [programs[0].layout.num_draws, model.config.vocab_size],
        "takes weights": takes_weights(model, plain),
        "bytes": device_bytes(model),
        "whole": sum(device_bytes(plain)),
        "drafted": 0 if (speculator := sharded.speculator) is None else speculator.num_drafted,
        "accepted": 0 if speculator is None else speculator.num_accepted,
        "preemptions": sharded.scheduler.num_preemptions,
        "seconds": time.process_time() - started,
    }


def run_everything(mesh: tuple[int, int]) -> dict[str, Any]:
    """Several steps in one, masks, log-probabilities of prompts and of outputs, on a mesh; one by one on one device."""
    (dp, tp), name = mesh, "llama 8/2"
    drawn = SamplingParams(temperature=0.8, max_tokens=20, logprobs=2, prompt_logprobs=1, allowed_token_ids=range(90))
    options = ({"seed": 1, "n": 2}, {"temperature": 0.0}, {"seed": 2, "stop_token_ids": range(40, 60)}, {"seed": 3})
    # A phrase needs the host after every token: while such a request runs, steps are single.
    phrase = replace(drawn, seed=4, max_tokens=3, bad_words=("7 8",))
    asked = [(text, replace(drawn, **options[i % 4])) for i, text in enumerate(prompts(131))] + [([4, 5], phrase)]

    def found(parallel: ParallelConfig, steps: int) -> tuple[list, list, list, list]:
        made = engine(load(name, parallel), Case(name, (dp, tp, 1), steps=steps), 64)
        several, events = [], []
        submit = made.runner.submit
        made.runner.submit = lambda plan: several.append(plan.num_steps) or submit(plan)  # type: ignore[method-assign]
        requests = [made.add_request(text, each, bad_words=[(7, 8)] if each.bad_words else ()) for text, each in asked]
        while made.has_work:
            events += made.step()
        sequences = [sequence for request in requests for sequence in request.sequences]
        places = {sequence: at for at, sequence in enumerate(sequences)}
        outputs = sorted(((places[e.sequence], e.logprobs) for e in events), key=lambda pair: pair[0])
        scores = [score for request in requests for score in request.prompt_results if score is not None]
        return [s.output for s in sequences], [score for _, score in outputs], scores, several

    alone, here = found(ONE, 1), found(ParallelConfig(tp, dp), 4)
    difference = 0.0
    for one, other in zip([*alone[1], *alone[2]], [*here[1], *here[2]], strict=True):
        assert (one.rank, one.top_ids) == (other.rank, other.top_ids)
        apart = np.subtract((one.logprob, *one.top_logprobs), (other.logprob, *other.top_logprobs))
        difference = max(difference, float(np.abs(apart).max()))
    return {
        "same": alone[0] == here[0],
        "scores": [len(here[1]), len(here[2])],
        "difference": difference,
        "steps": [sorted(set(alone[3])), sorted(set(here[3]))],
        "tokens": [min(map(len, here[0])), max(map(max, here[0]))],
    }


def run_default_model(mesh: tuple[int, int]) -> dict[str, Any]:
    """The default model as `LLM` loads it, against what transformers computed from the same file."""
    goldens, (dp, tp) = load_goldens(), mesh
    opened = open_model(resolve(os.environ.get("LLM_INFER_TEST_GGUF", DEFAULT_MODEL.name)))
    model = load_model(opened, stored=compute_dtype("auto", "exact")[1], parallel=ParallelConfig(tp, dp))
    made = Engine(model, EngineConfig(CacheConfig(num_pages=128), SchedulerConfig(8, BUCKET, 256)))
    made.runner.buckets = (BUCKET,)
    forced = assert_same_tokens(goldens, range(0, 24, 6), partial(greedy, made))
    inside, outside, _ = collectives(next(iter(made.runner._programs.values())).run.as_text())
    return {"forced": forced, "inside": inside, "outside": outside}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        special = re.fullmatch(r"(default model|everything) on (\d)x(\d)", name)
        run_special = run_default_model if name.startswith("default") else run_everything
        result = run_special((int(special[2]), int(special[3]))) if special else run(CASES[name])
        print(json.dumps({"name": name, **result}), flush=True)
