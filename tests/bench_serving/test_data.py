"""Data sets and traces: lengths are exact, files are read or refused, and prefixes are shared as they say."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_infer.base.errors import UserError
from llm_infer.bench.serving.client import Client, Target
from llm_infer.bench.serving.datasets import Lengths, prefix_repetition, random_requests, sharegpt, spec_bench
from llm_infer.bench.serving.requests import Conversation, Form, Turn
from llm_infer.bench.serving.traces import BLOCK, Recorded, conversations, read_trace
from llm_infer.bench.serving.vocabulary import WORDS, Vocabulary
from tests.bench_serving.fake_server import faked, three_words

VOCABULARY = Vocabulary(list(range(100, 300)))
DATA = Path(os.environ.get("LLM_INFER_TEST_DATA", "/nowhere"))
real_files = pytest.mark.skipif(not DATA.is_dir(), reason="LLM_INFER_TEST_DATA names the folder of traces")


def prompts(found: list[Conversation]) -> list[list[int]]:
    """The token ids that are sent first."""
    form = Form("m", False, True, VOCABULARY)
    return [json.loads(form.first(each.turns[0]))["prompt"] for each in found]


def test_random_prompts_have_exact_lengths_and_depend_on_the_seed_alone() -> None:
    found = random_requests(VOCABULARY, 200, Lengths(100, 20, 0.5, 7), 0)
    ids = prompts(found)
    assert ids == prompts(random_requests(VOCABULARY, 200, Lengths(100, 20, 0.5, 7), 0))
    assert ids != prompts(random_requests(VOCABULARY, 200, Lengths(100, 20, 0.5, 7), 1))
    assert [len(each) for each in ids] == [each.turns[0].input_tokens for each in found]
    lengths, outputs = {len(each) - 7 for each in ids}, {each.turns[0].output_tokens for each in found}
    assert min(lengths) >= 50 and max(lengths) <= 150 and len(lengths) > 60
    assert min(outputs) >= 10 and max(outputs) <= 30
    assert len({tuple(each[:7]) for each in ids}) == 1 and len({tuple(each[:20]) for each in ids}) == 200
    assert {len(each) for each in prompts(random_requests(VOCABULARY, 9, Lengths(33, 5), 0))} == {33}


def test_prefixes_repeat_evenly() -> None:
    ids = prompts(prefix_repetition(VOCABULARY, 20, 4, 50, 10, 5, 0))
    assert {len(each) for each in ids} == {60}
    counts = [
        sum(each[:50] == prefix for each in ids) for prefix in {tuple(each[:50]): each[:50] for each in ids}.values()
    ]
    assert counts == [5, 5, 5, 5] and len({tuple(each) for each in ids}) == 20


def test_the_vocabulary_is_what_the_servers_tokenizer_gives_for_words() -> None:
    async def found(tokens: Any) -> Vocabulary:
        async with faked(three_words) as fake:
            fake.tokens = tokens
            client = Client(Target(fake.url))
            try:
                return await Vocabulary.of_server(client, "fake")
            finally:
                client.close()

    assert asyncio.run(found([9, 8, 9, 7])).ids == [7, 8, 9]
    for useless in (None, [], [3, 3], ["a"], "x", {}):
        words = asyncio.run(found(useless))
        assert words.ids is None and words.text(words.draw(np.random.default_rng(0), 3)).count(" ") == 2
    assert len(set(WORDS)) == len(WORDS)


def test_azure_and_burstgpt_are_read(tmp_path: Path) -> None:
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    first, second = read_trace(str(azure))
    assert first == Recorded(0.0, 374, 44) and second.at == pytest.approx(4.314579, abs=1e-5)
    burst = tmp_path / "burst.csv"
    burst.write_text(
        "\ufeffTimestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n45.5,GPT-4,10,0,10,API log\n46,ChatGPT,1087,230,1317,API log\n"
    )
    assert read_trace(str(burst)) == [Recorded(0.0, 472, 18), Recorded(41.0, 1087, 230)]


def test_blocks_with_the_same_name_are_the_same_tokens(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 3000, "input_length": 1500, "output_length": 900, "hash_ids": [0, 1, 3]},
        {"timestamp": 1500, "input_length": 600, "output_length": 2, "hash_ids": [4, 5]},
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    trace = read_trace(str(file))
    assert [each.at for each in trace] == [0, 1.5, 3.0]
    found = conversations(trace, VOCABULARY, 0, scale=2.0)
    assert [each.at for each in found] == [0, 0.75, 1.5]
    first, other, second = prompts(found)
    assert (len(first), len(other), len(second)) == (1100, 600, 1500)
    assert first[: 2 * BLOCK] == second[: 2 * BLOCK] and first[2 * BLOCK :] != second[2 * BLOCK : 1100]
    assert first[:16] != other[:16]
    cut = conversations(trace, VOCABULARY, 0, max_input=700, max_output=100)
    assert [len(each) for each in prompts(cut)] == [700, 600, 700] and prompts(cut)[0] == first[:700]
    assert [each.turns[0].output_tokens for each in cut] == [5, 2, 100]
    assert prompts(conversations(trace, VOCABULARY, 1))[0][:16] != first[:16]


def test_prompts_without_blocks_share_nothing() -> None:
    first, second = prompts(conversations([Recorded(0.0, 50, 1), Recorded(0.0, 50, 1)], VOCABULARY, 0))
    assert first[:10] != second[:10]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a trace"),
        ("a,b\n1,2\n", "first line is 'a,b'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,5\n", "line 2 cannot be read"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,5,5\n", "line 2 cannot be read"),
        ('{"timestamp": 0}\n', "line 1 cannot be read"),
        ('{"timestamp": 0, "input_length": "x"}\n', "line 1 cannot be read"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": ["a"]}\n', "line 1 cannot be read"),
        ('{"timestamp": NaN, "input_length": 5, "output_length": 5}\n', "line 1 cannot be read: its time"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n\n5,inf,5\n", "line 3 cannot be read"),
        ('{"timestamp": 0,\n', "line 1 cannot be read"),
    ],
)
def test_a_file_that_is_no_trace_is_an_error(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "trace"
    file.write_text(text)
    with pytest.raises(UserError, match="--dataset-path") as error:
        read_trace(str(file))
    assert said in str(error.value)


def test_conversations_of_files(tmp_path: Path) -> None:
    spec = tmp_path / "spec.jsonl"
    spec.write_text('{"turns": ["a", "b"]}\n\n{"turns": ["c"]}\n')
    found = spec_bench(str(spec), 5, 9, 2, 0)
    assert len(found) == 5 and {tuple(turn.prompt for turn in each.turns) for each in found} == {("a", "b"), ("c",)}
    assert found[0].turns[0].output_tokens == 9 and all(
        len(each.turns) == 1 for each in spec_bench(str(spec), 2, 9, 1, 0)
    )
    share = tmp_path / "share.json"
    said = [("human", "q1"), ("gpt", "x" * 40), ("human", "q2"), ("gpt", "y"), ("human", "unanswered")]
    share.write_text(
        json.dumps([{"conversations": [{"from": who, "value": text} for who, text in said]}, {"conversations": []}, 5])
    )
    [one] = sharegpt(str(share), 1, None, 9, 0)
    assert one == Conversation([Turn("q1", 10), Turn("q2", 4)])
    assert sharegpt(str(share), 1, 77, 1, 0) == [Conversation([Turn("q1", 77)])]


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x"
    for text, said in (
        ("{}\n", 'line 1 has no texts in "turns"'),
        ("x", "line 1 is not JSON"),
        ("", "no conversation"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=said):
            spec_bench(str(file), 1, 9, 1, 0)
    for text, said in (("{}", "expected a JSON list"), ("[]", "no conversation"), ("x", "not valid JSON")):
        file.write_text(text)
        with pytest.raises(UserError, match=said):
            sharegpt(str(file), 1, None, 1, 0)


@real_files
def test_the_published_traces_are_read() -> None:
    azure = read_trace(str(DATA / "azure_llm_inference_2023_conv.csv"))
    assert len(azure) == 19_366 and azure[0] == Recorded(0.0, 374, 44) and 3400 < azure[-1].at < 3600
    mooncake = read_trace(str(DATA / "mooncake_conversation_4000.jsonl"))
    assert len(mooncake) == 4000 and all(len(each.blocks) == -(-each.input_tokens // BLOCK) for each in mooncake)
    first, second = conversations(mooncake[:2], VOCABULARY, 0)
    assert (first.turns[0].input_tokens, second.turns[0].input_tokens) == (6758, 7322)
    one, other = prompts([first, second])
    assert one[:BLOCK] == other[:BLOCK] and one[BLOCK : BLOCK + 16] != other[BLOCK : BLOCK + 16]
    assert len(spec_bench(str(DATA / "spec_bench_questions.jsonl"), 480, 9, 2, 0)) == 480
