"""lm-eval on an LLM: whole tasks, and requests against what the LLM says of the same tokens."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    import lm_eval
    from lm_eval.tasks import TaskManager

from llm_infer import LLM, SamplingParams, UserError
from llm_infer.integrations.lm_eval import LLMInferLM
from tests.integrations import tiny_text_model

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's own

TASKS = Path(__file__).parent / "tasks"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text_model.make(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(model, num_pages=64, progress=False)


@pytest.fixture
def lm(llm: LLM) -> LLMInferLM:
    return LLMInferLM(llm, max_gen_toks=8)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of tasks whose data are here; what is cached of them goes with the test."""
    for variable in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    for task in TASKS.glob("*.yaml"):
        (folder / task.name).write_text(task.read_text().replace("tests/integrations/tasks", str(TASKS)))
    yield folder


def requests(*each: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=args) for args in each]


def total(llm: LLM, ids: list[int], start: int) -> tuple[float, bool]:
    """What the LLM says of the tokens from `start` on: their log-likelihood, and whether it would draw them."""
    found = llm.score_tokens([ids], start)
    return found.logprobs[0][found.mask[0]].sum(), bool((found.ranks[0][found.mask[0]] == 1).all())


def test_whole_tasks(lm: LLMInferLM, llm: LLM, tasks: Path) -> None:
    names = ["tiny_choices", "tiny_answers", "tiny_texts"]
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0)
    assert found["results"].keys() == set(names)
    for sample in found["samples"]["tiny_choices"]:
        scores = []
        for (context, continuation), [score] in zip(sample["arguments"], sample["resps"], strict=True):
            ids, start = llm.tokenizer.encode(context + continuation), len(llm.tokenizer.encode(context))
            assert score == pytest.approx(total(llm, ids, start), abs=1e-4)
            scores.append(score[0])
        assert sample["acc"] == (scores.index(max(scores)) == sample["target"])
    greedy = SamplingParams(temperature=0.0, max_tokens=8)
    for sample in found["samples"]["tiny_answers"]:
        text = llm.generate(sample["arguments"][0][0], greedy)[0].outputs[0].text
        assert sample["resps"] == [[text.split("t")[0].split("\n")[0]]]


def test_the_command(model: Path, tasks: Path) -> None:
    settings = f"pretrained={model},num_pages=64,progress=False,max_model_len=48"
    command = [sys.executable, "-m", "llm_infer.integrations.lm_eval", "run", "--model", "llm_infer"]
    command += ["--model_args", settings, "--tasks", "tiny_choices", "--include_path", str(tasks)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|tiny_choices|" in done.stdout and "|acc_norm|" in done.stdout.replace(" ", "")


@pytest.mark.parametrize(
    ("context", "continuation", "start"),
    [("the cat", " dog", 3), ("the cat ", "dog", 3), ("", "the dog", 1), ("", "<s>the dog", 1), ("<s>the", " dog", 2)],
)
def test_where_a_continuation_begins(context: str, continuation: str, start: int, lm: LLMInferLM, llm: LLM) -> None:
    ids = llm.tokenizer.encode((context + continuation).removeprefix("<s>"))
    assert ids[0] == 1
    [found] = lm.loglikelihood(requests((context, continuation)), disable_tqdm=True)
    assert found == pytest.approx(total(llm, ids, start), abs=1e-4)


def test_what_greedy_decoding_gives_is_found_so(lm: LLMInferLM) -> None:
    [text] = lm.generate_until(requests(("the cat", {"max_gen_toks": 3})), disable_tqdm=True)
    assert len(text) == 3  # each letter is a token
    found = lm.loglikelihood(requests(("the cat", text), ("the cat", text[:-1] + "#")), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]


def test_contexts_that_are_too_long_lose_their_beginning(lm: LLMInferLM, llm: LLM) -> None:
    context, continuation = "xyz" * 40, "123"
    [found] = lm.loglikelihood(requests((context, continuation)), disable_tqdm=True)
    ids = llm.tokenizer.encode(context + continuation)[-64:]
    assert found == pytest.approx(total(llm, ids, 61), abs=1e-4)
    [text] = lm.generate_until(requests((context, {"max_gen_toks": 4})), disable_tqdm=True)
    ids = llm.tokenizer.encode(context)[-60:]
    assert text == llm.generate([ids], SamplingParams(temperature=0.0, max_tokens=4))[0].outputs[0].text
    with pytest.raises(UserError, match=r"64 to score, expected at least one of each"):
        lm.loglikelihood(requests(("a", "x" * 64)), disable_tqdm=True)


@pytest.mark.parametrize("length", [10, 63, 64, 65, 200])
def test_texts_are_scored_in_windows_of_the_context(length: int, lm: LLMInferLM, llm: LLM) -> None:
    text = ("the quick brown fox jumps over 13 dogs. " * 5)[:length]
    ids, sums = [1, *llm.tokenizer.encode(text)], []
    for begin in range(1, len(ids), 63):
        end = min(begin + 63, len(ids))
        row = ids[:end][-64:]
        sums.append(total(llm, row, len(row) - (end - begin))[0])
    found = lm.loglikelihood_rolling(requests((text,), ("",), ("a",)), disable_tqdm=True)
    assert found[0] == pytest.approx(sum(sums), abs=1e-3)
    assert found[2] == pytest.approx(total(llm, [1, *llm.tokenizer.encode("a")], 1)[0], abs=1e-4)


def test_how_answers_are_drawn(lm: LLMInferLM, llm: LLM) -> None:
    def answers(*wanted: dict[str, Any]) -> list[str]:
        return lm.generate_until(requests(*(("the dog", each) for each in wanted)), disable_tqdm=True)

    def expected(**settings: Any) -> str:
        return llm.generate("the dog", SamplingParams(**settings))[0].outputs[0].text

    greedy, short, not_sampled, warm, drawn = answers(
        {},
        {"max_new_tokens": 3, "until": ["", "\x00"]},
        {"do_sample": False, "temperature": 0.9, "seed": 3},
        {"temperature": 3.0, "seed": 3, "top_p": 0.9},
        {"do_sample": True, "seed": 3, "min_tokens": 2},
    )
    assert greedy == not_sampled == expected(temperature=0.0, max_tokens=8) and short == greedy[:3]
    assert warm == expected(temperature=3.0, seed=3, top_p=0.9, max_tokens=8)
    assert drawn == expected(seed=3, min_tokens=2, max_tokens=8)
    letter = warm[4]
    assert letter not in warm[:4] and warm != greedy
    wanted = {"temperature": 3.0, "seed": 3, "top_p": 0.9, "until": [letter, "never"]}
    assert answers(wanted) == [warm[: warm.index(letter)]]
    thinker = LLMInferLM(llm, max_gen_toks=8, think_end_token=letter)
    [rest] = thinker.generate_until(requests(("the dog", {**wanted, "until": warm[0]})), disable_tqdm=True)
    assert rest == warm.split(letter)[-1].lstrip().split(warm[0])[0]


def test_chats(lm: LLMInferLM, llm: LLM) -> None:
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a dog"}]
    assert lm.apply_chat_template(chat) == "<s>[user] the cat\n[assistant] a dog\n[assistant]"
    assert lm.tok_encode(lm.apply_chat_template(chat)) == llm.chat_prompt(chat)
    assert lm.apply_chat_template(chat, add_generation_prompt=False) == "<s>[user] the cat\n[assistant] a dog"
    with_system = [{"role": "system", "content": "be"}, *chat]
    assert lm.apply_chat_template(with_system) == lm.apply_chat_template(chat)
    assert lm.chat_template(True) == tiny_text_model.TEMPLATE == lm.chat_template("default")
    assert lm.chat_template(False) is None
    with pytest.raises(UserError, match="chat_template='other': the model has default"):
        lm.chat_template("other")
    assert lm.tokenizer_name == "llm_infer"


def test_a_chat_in_a_task(lm: LLMInferLM, tasks: Path) -> None:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        lm, tasks=["tiny_answers"], task_manager=manager, bootstrap_iters=0, apply_chat_template=True
    )
    assert found["samples"]["tiny_answers"][0]["arguments"][0][0] == "<s>[user] Which animal barks?\n[assistant]"


def test_what_is_refused(lm: LLMInferLM, llm: LLM) -> None:
    for wanted, message in (
        ({"num_beams": 4}, "generation_kwargs: num_beams: expected some of"),
        ({"n": 2}, "generation_kwargs: n:"),
        ({"max_gen_toks": 64}, "max_gen_toks=64 leaves nothing of the context of 64"),
        ({"do_sample": True, "top_p": 2.0}, "top_p=2.0"),
    ):
        with pytest.raises(UserError, match=message):
            lm.generate_until(requests(("a", wanted)), disable_tqdm=True)
    with pytest.raises(UserError, match="max_model_len: the LLM that is there"):
        LLMInferLM(llm, max_model_len=8)
    with pytest.raises(UserError, match="device='cuda:1': expected one of auto"):
        LLMInferLM("never read", device="cuda:1")
    with pytest.raises(UserError, match="has no tokenizer"):
        LLMInferLM(str(tiny_text_model.WEIGHTS), load_format="dummy", skip_tokenizer_init=True, num_pages=8)
