"""The same tokens on every mesh, what each program tells its neighbours, and errors for meshes that cannot be."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from llm_infer.base.errors import UserError
from llm_infer.config import ParallelConfig
from llm_infer.models.config import ModelConfig, MoEConfig
from llm_infer.models.sharded import place_over
from llm_infer.weights.rules import Rule
from llm_infer.weights.stored_blocks import stored_kinds
from tests.parallel.processes import output_of

CASES = (
    *("8/8 on 8x1", "8/8 on 1x8", "8/8 on 2x4", "8/2 on 8x1", "8/2 on 1x8", "8/2 on 2x4", "moe on 2x2x2"),
    *(
        "opt on 2x4",
        "gemma3 on 2x4",
        "qwen2 with biases on 1x8",
        "converted on 1x8",
        "native kernels on 2x2",
        "int8 pages on 2x2",
        "sampled, preempted, cached on 2x4",
        "lfm2 sampled, cached on 2x2",
    ),
    *("beams on 2x4", "speculation on 2x4", "draft model on 2x2"),
)
MORE_CASES = (
    "lfm2 on 2x4",
    "lfm2-moe on 2x2x2",
    *("olmo2 on 1x8", "gpt-oss on 2x2x2", "minimax on 2x2x2", "glm-4.5 on 2x2x2"),
    "wide experts on 1x2x2",
    "unfused on 1x4",
    "penalties on 4x2",
    "several steps on 2x4",
)


EVERYTHING = "everything on 2x2"


def run_cases(names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Results of cases, from one process with eight devices."""
    lines = output_of("tests.parallel.mesh_cases", *names)
    results = [json.loads(line) for line in lines if line.startswith("{")]
    return {result["name"]: result for result in results}


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    return run_cases((*CASES, EVERYTHING))


def check_tokens(result: dict[str, Any]) -> None:
    print(f"{result['name']}: led back {result['forced']} times where two tokens were within 2e-3")
    assert result["same"] and result["takes weights"]
    assert result["forced"] == 0, "zero so far: look into it"


def check_collectives(result: dict[str, Any]) -> None:
    """Two all-reduces a layer, one for the embedding, and one all-gather, of logits; none where layers are not cut."""
    sizes = [int(size) for size in result["name"].rpartition(" ")[2].split("x")]
    cut = math.prod(sizes[1:])
    if cut == 1:
        assert not result["inside"] and not result["outside"]
        return
    # Norms over all heads sum the squares of queries and keys, in one.
    inside = 3 if result["name"].startswith(("olmo2", "minimax")) else 2
    inside *= (
        2 if result["name"].startswith("glm-4.5") else 1
    )  # a loop over dense layers, and one over those with experts
    alone = 0
    if result["name"].startswith("lfm2-moe"):  # a loop over dense layers, and one over pairs of those with experts
        inside = 3 * inside
    elif result["name"].startswith("lfm2"):  # three layers in the loop, which goes around twice, and three behind it
        inside, alone = 3 * inside, 3 * inside
    assert result["inside"] == {"all-reduce": inside}, "a layer (the body of the loop over layers)"
    assert result["outside"] == {"all-reduce": 1 + alone, "all-gather": 1}
    rows, vocab = result["logits"]
    assert result["gathered"] == [f"f32[{rows},{-(-vocab // cut) * cut}]"], "logits, not weights nor pages"
    assert all(other == {"all-reduce": 3, "all-gather": 1} for other in result["others"])


@pytest.mark.parametrize("name", CASES)
def test_same_tokens_as_one_device(results: dict[str, dict[str, Any]], name: str) -> None:
    check_tokens(results[name])


@pytest.mark.parametrize("name", CASES)
def test_collectives_of_a_step(results: dict[str, dict[str, Any]], name: str) -> None:
    check_collectives(results[name])


def check_everything(result: dict[str, Any]) -> None:
    assert result["same"] and result["difference"] < 1e-4
    assert min(result["scores"]) > 200, "log-probabilities of outputs and of prompts"
    alone, here = result["steps"]
    assert alone == [1] and min(here) == 1 and max(here) == 4, "single steps on one device; here up to four in one"
    shortest, largest = result["tokens"]
    assert shortest <= 3 and largest < 90, "one request waits for the host after each token; ids from 90 are forbidden"


def test_several_steps_masks_and_prompts_as_on_one_device(results: dict[str, dict[str, Any]]) -> None:
    check_everything(results[EVERYTHING])


@pytest.mark.sweep
def test_everything_on_more_meshes() -> None:
    for result in run_cases(("everything on 2x1", "everything on 4x2", "everything on 1x4")).values():
        check_everything(result)


@pytest.mark.sweep
def test_tokens_and_collectives_of_more_cases() -> None:
    for result in run_cases(MORE_CASES).values():
        check_tokens(result)
        check_collectives(result)


def test_every_device_has_its_part_of_the_weights(results: dict[str, dict[str, Any]]) -> None:
    whole = results["8/8 on 8x1"]["bytes"]
    parts = results["8/8 on 1x8"]["bytes"]
    assert set(whole) == {results["8/8 on 8x1"]["whole"]} and len(whole) == len(parts) == 8
    # Norms are on every device, all else is cut in eight; 131 rows of the vocabulary are filled up to 136.
    norms, table = 4 * 5 * 32, 4 * 131 * 32
    assert set(parts) == {(whole[0] - norms - table) // 8 + norms + 4 * 136 * 32 // 8}


def test_pages_ran_out_in_the_case_that_is_about_it(results: dict[str, dict[str, Any]]) -> None:
    assert results["sampled, preempted, cached on 2x4"]["preemptions"] > 0


def test_a_draft_model_on_the_mesh_is_right_now_and_then(results: dict[str, dict[str, Any]]) -> None:
    assert 0 < results["draft model on 2x2"]["accepted"] < results["draft model on 2x2"]["drafted"]


@pytest.mark.real
def test_default_model_on_meshes() -> None:
    """Real weights in the blocks of their file, cut in three; and on two and four shards."""
    results = run_cases(("default model on 1x3", "default model on 2x1", "default model on 4x1"))
    assert all(result["forced"] == 0 for result in results.values())
    assert results["default model on 1x3"]["inside"] == {"all-reduce": 2}
    assert results["default model on 4x1"]["inside"] == results["default model on 4x1"]["outside"] == {}


GQA = ModelConfig("LlamaForCausalLM", 131, 32, 2, 9, 3, 16, 96, 256)
MOE = ModelConfig("Qwen3MoeForCausalLM", 131, 32, 2, 8, 4, 16, 1, 256, moe=MoEConfig(6, 2, 32))


@pytest.mark.parametrize(
    ("config", "sizes", "devices", "message"),
    [
        (GQA, dict(tensor_parallel_size=2), 8, "9 query heads.*3 KV heads.*: set tensor_parallel_size=1"),
        (GQA, dict(tensor_parallel_size=4), 8, "set tensor_parallel_size=3"),
        (
            GQA,
            dict(tensor_parallel_size=9),
            16,
            "intermediate_size=96 does not divide by 9: set tensor_parallel_size=3",
        ),
        (GQA, dict(tensor_parallel_size=3, data_parallel_size=4), 8, "needs 12 devices, there are 8: set .*=1, .*=4"),
        (GQA, dict(expert_parallel_size=2), 8, "no experts: set expert_parallel_size=1$"),
        (MOE, dict(expert_parallel_size=4), 8, "6 experts do not divide by 4: set .*expert_parallel_size=2"),
        (MOE, dict(tensor_parallel_size=16), 32, "16 times.* 8 query heads.*set tensor_parallel_size=8"),
    ],
)
def test_a_mesh_that_cannot_be_names_the_nearest(
    config: ModelConfig, sizes: dict[str, int], devices: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        place_over(config, ParallelConfig(**sizes), [None] * devices)


class OneMatrix:
    """A source whose every tensor is 64 rows of three blocks."""

    def shape(self, name: str) -> tuple[int, int]:
        return 64, 96

    def stored_kind(self, name: str) -> str:
        return "q4_1"


def test_blocks_are_not_cut() -> None:
    rule = Rule("layers.attn.o.weight", ("{layer}.o",))
    assert stored_kinds(OneMatrix(), rule, 1, cuts=3) == ("q4_1",)  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"rows of 3 blocks of q4_1 cannot be cut for 2 devices: .* to 1 or another divisor"
    ):
        stored_kinds(OneMatrix(), rule, 1, cuts=2)  # type: ignore[arg-type]
