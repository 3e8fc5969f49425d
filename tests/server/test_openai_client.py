"""OpenAI's own client: each reply and each event is what it and OpenAI's published schemas expect."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion import Completion

from llm_infer import SamplingParams
from llm_infer.decoding.structured import StructuredOutputsParams
from llm_infer.text.chat_prompt import chat_ids
from tests.server.conftest import CHATML, NAME, Served

HELLO: Any = [{"role": "user", "content": "The page table"}]
DATA = Path(os.environ.get("LLM_INFER_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))

Check = Callable[[str, Any], None]


@pytest.fixture(scope="module")
def check() -> Check:
    """Checks a value against one of OpenAI's published schemas; does nothing where they are not there."""
    schemas, tool = DATA / "openai_schemas.json", DATA.parent / "tools" / "openai_schema.py"
    if not schemas.is_file() or not tool.is_file():
        return lambda name, value: None
    spec = importlib.util.spec_from_file_location("openai_schema", tool)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    validator = module.load(str(schemas))

    def checked(name: str, value: Any) -> None:
        errors = [f"{list(one.absolute_path)}: {one.message[:300]}" for one in validator(name).iter_errors(value)]
        assert not errors, errors

    return checked


@pytest.fixture
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def offline(served: Served, messages: Any, params: SamplingParams) -> list[str]:
    """The texts that `LLM` gives for a conversation."""
    served.wait_until(served.is_idle)
    ids = chat_ids(served.llm.tokenizer, messages, chat_template=CHATML)
    return [one.text for one in served.llm.generate([ids], params)[0].outputs]


def streamed(chunks: Any, check: Check, n: int = 1) -> tuple[list[str], list[str | None], Any]:
    """The texts and finish reasons of a stream, and its usage."""
    texts, reasons, usage, ids = [""] * n, [None] * n, None, set()
    for chunk in chunks:
        raw = chunk.model_dump(mode="json", exclude_unset=True)
        ChatCompletionChunk.model_validate(raw)
        check("CreateChatCompletionStreamResponse", raw)
        ids.add(chunk.id)
        for choice in chunk.choices:
            if choice.finish_reason is not None:
                assert not choice.delta.content
                reasons[choice.index] = choice.finish_reason
            texts[choice.index] += choice.delta.content or ""
        usage = chunk.usage or usage
    assert len(ids) == 1
    return texts, reasons, usage


@pytest.mark.parametrize(
    ("body", "params"),
    [
        ({"temperature": 0, "max_tokens": 12}, {"temperature": 0.0, "max_tokens": 12}),
        ({"seed": 3, "n": 3, "max_tokens": 9}, {"seed": 3, "n": 3, "max_tokens": 9}),
        (
            {"seed": -1, "temperature": 2.0, "max_completion_tokens": 20, "stop": [" the", "ing"]},
            {"seed": 2**64 - 1, "temperature": 2.0, "max_tokens": 20, "stop": (" the", "ing")},
        ),
        (
            {"temperature": 0, "max_tokens": 9, "logit_bias": {"7": 5}, "frequency_penalty": 0.5},
            {"temperature": 0.0, "max_tokens": 9, "logit_bias": {7: 5.0}, "frequency_penalty": 0.5},
        ),
    ],
)
def test_a_chat_is_the_same_whole_streamed_and_offline(
    served: Served, client: OpenAI, check: Check, body: dict, params: dict
) -> None:
    whole = client.chat.completions.create(model=NAME, messages=HELLO, **body)
    raw = whole.model_dump(mode="json", exclude_unset=True)
    ChatCompletion.model_validate(raw)
    check("CreateChatCompletionResponse", raw)
    n = body.get("n", 1)
    wanted = offline(served, HELLO, SamplingParams(**params))
    assert [choice.message.content for choice in whole.choices] == wanted
    assert [choice.index for choice in whole.choices] == list(range(n))
    chunks = client.chat.completions.create(
        model=NAME, messages=HELLO, stream=True, stream_options={"include_usage": True}, **body
    )
    texts, reasons, usage = streamed(chunks, check, n)
    assert texts == wanted
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_structured_output_is_what_was_asked_for(served: Served, client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    found = client.chat.completions.create(
        model=NAME, messages=HELLO, response_format=form, max_tokens=40, seed=1
    ).choices[0]
    assert found.message.content is not None
    assert found.message.content.replace(" ", "").replace("\n", "") in ('{"yes":true}', '{"yes":false}')
    params = SamplingParams(seed=1, max_tokens=40, structured_outputs=StructuredOutputsParams(json=schema))
    assert [found.message.content] == offline(served, HELLO, params)
    choice = client.chat.completions.create(
        model=NAME, messages=HELLO, extra_body={"structured_outputs": {"choice": ["New York", "Boston"]}}
    ).choices[0]
    assert choice.message.content in ("New York", "Boston")


def test_log_probabilities_of_a_chat(client: OpenAI, check: Check) -> None:
    body: Any = dict(model=NAME, messages=HELLO, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3)
    whole = client.chat.completions.create(**body)
    check("CreateChatCompletionResponse", whole.model_dump(mode="json", exclude_unset=True))
    content = whole.choices[0].logprobs.content
    assert len(content) == 5
    for one in content:
        assert len(one.top_logprobs) == 3
        assert one.logprob == one.top_logprobs[0].logprob  # greedy
        assert bytes(one.bytes).decode("utf-8", "replace") == one.token
    parts = [c.choices[0].logprobs for c in client.chat.completions.create(stream=True, **body) if c.choices]
    joined = [one for part in parts if part is not None for one in part.content]
    assert [one.token for one in joined] == [one.token for one in content]
    assert [one.logprob for one in joined] == pytest.approx([one.logprob for one in content], abs=1e-4)


def test_completions_of_several_prompts_come_in_order(served: Served, client: OpenAI, check: Check) -> None:
    prompts = ["The page", "日本語 と", [1, 20, 30]]
    texts = []
    for prompt in prompts:
        found: Any = client.completions.create(model=NAME, prompt=prompt, n=2, seed=1, max_tokens=6)
        texts += [choice.text for choice in found.choices]
    both: Any = client.completions.create(model=NAME, prompt=prompts[:2], n=2, seed=1, max_tokens=6)
    raw = both.model_dump(mode="json", exclude_unset=True)
    Completion.model_validate(raw)
    check("CreateCompletionResponse", raw)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in both.choices] == texts[:4]
    parts = [""] * 4
    for chunk in client.completions.create(model=NAME, prompt=prompts[:2], n=2, seed=1, max_tokens=6, stream=True):
        for choice in chunk.choices:
            parts[choice.index] += choice.text
    assert parts == texts[:4]


def test_echo_scores_the_prompt(served: Served, client: OpenAI) -> None:
    text = "The page table maps"
    found: Any = client.completions.create(model=NAME, prompt=text, echo=True, logprobs=1, max_tokens=1, temperature=0)
    choice = found.choices[0]
    assert choice.text.startswith(text)
    logprobs = choice.logprobs
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert all(isinstance(one, dict) for one in logprobs.top_logprobs[1:])
    alone: Any = client.completions.create(model=NAME, prompt=text, echo=True, logprobs=1, max_tokens=0)
    assert alone.choices[0].text == text
    assert alone.choices[0].logprobs.token_logprobs == pytest.approx(logprobs.token_logprobs[:-1], abs=1e-4)
    assert alone.usage.completion_tokens == 0
    served.wait_until(served.is_idle)
    ids = served.llm.tokenizer.encode(text)
    want = served.llm.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=0))[0].prompt_logprobs
    assert logprobs.token_logprobs[1:-1] == pytest.approx(
        [at[i].logprob for i, at in zip(ids[1:], want[1:], strict=True)], abs=1e-4
    )


def test_embeddings_are_those_of_llm(served: Served, client: OpenAI, check: Check) -> None:
    texts = ["The page", "maps"]
    found = client.embeddings.create(model=NAME, input=texts)  # the client asks for base64
    check("CreateEmbeddingResponse", found.model_dump(mode="json", exclude_unset=True))
    CreateEmbeddingResponse.model_validate(found.model_dump())
    served.wait_until(served.is_idle)
    ids = [served.llm.tokenizer.encode(text) for text in texts]
    for one, want in zip(found.data, served.llm.embed(ids), strict=True):
        assert one.embedding == pytest.approx(want.embedding, abs=1e-5)
    floats = client.embeddings.create(model=NAME, input=ids, encoding_format="float")
    assert floats.data[1].embedding == pytest.approx(found.data[1].embedding, abs=1e-5)
    assert floats.usage.prompt_tokens == sum(map(len, ids))


def test_models_and_their_names(client: OpenAI, check: Check) -> None:
    found = client.models.list()
    check("ListModelsResponse", found.model_dump(mode="json", exclude_unset=True))
    assert [one.id for one in found.data] == [NAME, "gpt-4.1"]
    Model.model_validate(client.models.retrieve(NAME).model_dump())
    assert client.chat.completions.create(model="gpt-4.1", messages=HELLO, max_tokens=1).model == "gpt-4.1"


def test_errors_are_those_that_the_client_knows(served: Served, client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="another", messages=HELLO)
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=NAME, messages=HELLO, temperature=3)
    with pytest.raises(openai.BadRequestError, match="128"):
        client.completions.create(model=NAME, prompt=[5] * 200, max_tokens=4)
    with pytest.raises(openai.BadRequestError, match="128"):
        list(client.completions.create(model=NAME, prompt=[5] * 200, max_tokens=4, stream=True))
    parts: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\]\.content\[0\]\.type"):
        client.chat.completions.create(model=NAME, messages=parts)


def test_cached_tokens_are_counted(served: Served, client: OpenAI) -> None:
    prompt = [77] * 40
    body: Any = dict(model=NAME, prompt=prompt, max_tokens=2, extra_body={"cache_salt": "counted"})
    first, second = (client.completions.create(**body).usage.prompt_tokens_details.cached_tokens for _ in range(2))
    assert (first, second) == (0, 32)
    body["extra_body"] = {"cache_salt": "other"}
    assert client.completions.create(**body).usage.prompt_tokens_details.cached_tokens == 0


def test_beams_are_those_of_llm(served: Served, client: OpenAI) -> None:
    body: Any = dict(model=NAME, prompt="The page", n=3, max_tokens=5, extra_body={"use_beam_search": True})
    found = client.completions.create(**body)
    served.wait_until(served.is_idle)
    ids = served.llm.tokenizer.encode("The page")
    want = served.llm.beam_search([ids], SamplingParams(beam_width=3, max_tokens=5))[0].outputs
    assert [choice.text for choice in found.choices] == [one.text for one in want]
    with pytest.raises(openai.BadRequestError, match="stream"):
        client.completions.create(stream=True, **body)
