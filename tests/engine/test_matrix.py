"""The same request gives the same tokens alone and in every combination of strategies and shortages.

The committed rows contain every pair of values of any two factors; a few more are drawn from the full product, which runs
with `-m sweep`.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest

from llm_infer.config import SpeculativeConfig
from llm_infer.decoding.features import PLAIN, StepFeatures
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.engine import Engine
from llm_infer.models.config import MoEConfig, RopeConfig
from llm_infer.models.load import dummy_model
from llm_infer.scheduler.plan import StepPlan
from tests.engine.engines import STEPS, EngineFactory, run_all, without_clock
from tests.engine.test_speculation import CONFIG

FACTORS = {
    "cache": (True, False),
    "chunk": (32, 8),
    "pages": (64, 8),  # eight (seven without beams) are too few for all that start together: some lose theirs
    "copies": (True, False),  # several samples of a prompt share its last page, and copy it to write
    "steps": (1, STEPS),
    "speculation": ("none", "ngram", "draft"),
    "beams": (True, False),
    "overlap": (True, False),
}
Row = tuple
SPECULATIVE = {
    "none": None,
    "ngram": SpeculativeConfig(num_speculative_tokens=5, prompt_lookup_max=3, prompt_lookup_min=1),
    "draft": SpeculativeConfig("draft_model", 4, model="another"),
}
ROWS: list[Row] = [
    # cache, chunk, pages, copies, steps, speculation, beams, overlap
    (True, 32, 64, True, 1, "none", True, True),
    (False, 8, 8, False, STEPS, "none", False, False),
    (True, 8, 8, True, STEPS, "ngram", False, True),
    (False, 32, 64, False, 1, "ngram", True, False),
    (True, 32, 8, False, STEPS, "draft", True, True),
    (False, 8, 64, True, 1, "draft", False, False),
    (True, 8, 64, False, STEPS, "none", True, False),
    (False, 32, 8, True, 1, "none", False, True),
    (True, 32, 64, True, STEPS, "none", False, True),
]
PRODUCT = list(itertools.product(*FACTORS.values()))
DRAWN = random.Random(20).sample(PRODUCT, 10)


WINDOWS = (5, 24, None)
MODELS = {
    "llama": CONFIG,
    # As Gemma 3 and gpt-oss: windows shorter and longer than a page, each with its own rotation.
    "windows": replace(
        CONFIG,
        num_layers=3,
        windows=WINDOWS,
        layer_ropes=tuple(RopeConfig(1e4 if window else 1e6) for window in WINDOWS),
        norms="both",
        activation="gelu_tanh",
        attention_softcap=20.0,
        qk_norm=True,
    ),
    # As LFM2, but that its first layer attends, of which the draft model is made.
    "convolutions": replace(
        CONFIG,
        architecture="Lfm2ForCausalLM",
        num_layers=4,
        kinds=("attention", "conv", "conv", "attention"),
        conv_taps=3,
        qk_norm=True,
    ),
    "experts": replace(
        CONFIG,
        windows=(24, None),
        sinks=True,
        activation="clamped",
        output_bias=True,
        moe=MoEConfig(4, 2, 32, router_bias=True, expert_biases=True),
    ),
}


def over_models(rows: list[Row]) -> list:
    """Every row with each model; for the others than Llama most run with `-m sweep`."""
    return [
        pytest.param(
            name, row, id=f"{name}-{row}", marks=[] if name == "llama" or row in ROWS[2:5] else [pytest.mark.sweep]
        )
        for name in MODELS
        for row in rows
    ]


def test_rows_contain_every_pair() -> None:
    assert len(ROWS) <= 24 and set(ROWS) <= set(PRODUCT)
    for (i, first), (j, second) in itertools.combinations(enumerate(FACTORS.values()), 2):
        missing = set(itertools.product(first, second)) - {(row[i], row[j]) for row in ROWS}
        assert not missing, (list(FACTORS)[i], list(FACTORS)[j], missing)


BEAMS_ALONE = 4
"""Pages that a search needs more where its beams have none in common."""


def num_groups(name: str) -> int:
    return len(set(MODELS[name].windows)) or 1


@cache
def factory_of(name: str) -> EngineFactory:
    """Engines over one of MODELS, made once: pytest would make a fixture anew for each row."""
    config = MODELS[name]
    model, small = dummy_model(config, seed=3), dummy_model(config.with_layers(1))
    # A model with the target's first layer alone is right now and then.
    whole = {name: model.params[name] for name in small.params}
    params = {name: p if name.startswith(("embed", "final")) else p[:1] for name, p in whole.items()}
    factory = EngineFactory(
        model,
        max_num_seqs=8,
        num_pages=64 * num_groups(name),
        max_model_len=96,
        draft_model=replace(small, params=params),
    )
    factory.buckets = (8, 32)
    engine = factory(speculative=SPECULATIVE["draft"], chunk=32)
    assert engine._draft_model is not None
    for bucket in factory.buckets:
        engine.runner.compile(bucket, PLAIN)
        engine.runner.compile(bucket, StepFeatures.BEAMS | StepFeatures.DRAFTS)  # serves for either of them, too
    return factory


def requests(*, copies: bool, beams: bool) -> list[tuple[list[int], SamplingParams]]:
    """Prompts around page boundaries, some with a common beginning that repeats; greedy, drawn and searched."""
    rng = np.random.default_rng(5)
    shared = rng.integers(1, 131, 18).tolist()
    prompts = [rng.integers(1, 131, n).tolist() for n in (1, 15, 16, 33)]
    prompts += [shared + rng.integers(1, 131, n).tolist() + shared[:9] for n in (1, 5, 12)] + [shared]
    greedy = partial(SamplingParams, temperature=0.0, max_tokens=20, ignore_eos=True)
    drawn = partial(SamplingParams, temperature=0.4, top_k=5, max_tokens=22)
    several = 3 if copies else 1
    params = [greedy(), drawn(seed=1, n=several), greedy(stop_token_ids=(5, 9)), drawn(seed=2), greedy()]
    params += [drawn(seed=3, n=several, stop_token_ids=(7, 20, 40)), greedy(max_tokens=9), drawn(seed=4, n=several)]
    asked = list(zip(prompts, params, strict=True))
    if beams:
        search = partial(SamplingParams, beam_width=3, max_tokens=10)
        asked[2:2] = [(prompts[2], search()), (prompts[4], search(stop_token_ids=(3, 17), length_penalty=0.5))]
    return asked


@cache
def alone(name: str) -> dict:
    """What each request gives when nothing else is in the engine, one token at a time, the prompt in one piece."""
    found, make_engine = {}, factory_of(name)
    for copies, beams in itertools.product((True, False), repeat=2):
        for prompt, params in requests(copies=copies, beams=beams):
            if (key := (tuple(prompt), params)) not in found:
                engine = make_engine(chunk=32, cache=False, overlap=False)
                found[key] = run_all(engine, [prompt], params)[0]
    return found


def check(name: str, row: Row) -> None:
    make_engine = factory_of(name)
    values = dict(zip(FACTORS, row, strict=True))
    copies, beams, speculation = values.pop("copies"), values.pop("beams"), values.pop("speculation")
    pages = values.pop("pages")
    groups = num_groups(name)  # each has pages of its own
    given = groups * (pages - (pages == 8 and not beams)) + 2 * (groups > 1 and pages == 8)
    if name == "convolutions" and beams and pages == 8:  # beams share no pages when they come back
        given += BEAMS_ALONE
    engine: Engine = make_engine(speculative=SPECULATIVE[speculation], pages=given, **values)
    assert len(engine.scheduler.books.windows) == groups
    without_clock(engine)
    submit, steps = engine.runner.submit, []

    def counted(plan: StepPlan) -> object:
        steps.append(plan.num_steps)
        return submit(plan)

    engine.runner.submit = counted  # type: ignore[method-assign,assignment]
    asked = requests(copies=copies, beams=beams)
    for _ in range(1 + values["cache"]):  # the second time the prefix cache is filled
        outputs = run_all(engine, [prompt for prompt, _ in asked], [params for _, params in asked])
        for (prompt, params), output in zip(asked, outputs, strict=True):
            assert output == alone(name)[tuple(prompt), params], (row, len(prompt), params)
    scheduler, speculator = engine.scheduler, engine.speculator
    # What the row is about has happened.
    if pages == 64:
        assert scheduler.num_preemptions == 0
        assert speculator is None or 0 < speculator.num_accepted < speculator.num_drafted
    # Short chunks spread the starts, so that few pages may suffice; so they may where windows give some back.
    elif values["chunk"] == 32 and name == "llama":
        assert scheduler.num_preemptions > 0
    assert scheduler.num_copied_pages > 0 or not (copies or beams)
    assert max(steps) == (values["steps"] if speculator is None else max(steps))
    assert not values["cache"] or scheduler.prefix_cache is None or scheduler.prefix_cache.num_hits > 0


@pytest.mark.parametrize(("name", "row"), over_models(ROWS))
def test_every_pair(name: str, row: Row) -> None:
    check(name, row)


@pytest.mark.parametrize(("name", "row"), over_models(DRAWN))
def test_some_of_the_product(name: str, row: Row) -> None:
    check(name, row)


@pytest.mark.sweep
@pytest.mark.parametrize("name", MODELS)
def test_the_product(name: str) -> None:
    failed = []
    for row in PRODUCT:
        try:
            check(name, row)
        except AssertionError as error:
            failed.append(f"{row}: {error}")
    assert not failed, "\n".join(failed)
