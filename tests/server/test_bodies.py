"""Bodies that no client should send: each gets an answer that says why, and the server goes on."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
import pytest

from llm_infer.server.protocol import ChatRequest, CompletionRequest
from tests.server.conftest import NAME, Served

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
COMPLETION = {"prompt": "Hi", "max_tokens": 2}
ROUTES: list[tuple[str, dict[str, Any]]] = [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)]
WRONG = ["-1e400", "1e999", "NaN", "Infinity", '"1"', "[]", "{}", str(2**63), str(-(2**63) - 1), "true"]
INTEGERS = ["n", "max_tokens", "top_k", "min_tokens", "seed", "truncate_prompt_tokens", "prompt_logprobs", "priority"]
FLOATS = ["temperature", "top_p", "min_p", "typical_p", "frequency_penalty", "presence_penalty", "repetition_penalty"]


def refused(client: httpx.Client, route: str, content: bytes | str, status: int = 400) -> dict[str, Any]:
    """The error of a body that is refused; it is short, and names none of our files."""
    answer = client.post(route, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, (content[:200], answer.status_code, answer.text[:500])
    assert len(answer.content) < 4096 and b"/llm_infer/" not in answer.content
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def test_every_number_out_of_its_range_is_refused_by_name(client: httpx.Client) -> None:
    for route, body in ROUTES:
        for name in INTEGERS + FLOATS:
            for value in WRONG:
                text = json.dumps(body)[:-1] + f', "{name}": {value}}}'
                if name == "seed" and value == str(-(2**63)):
                    continue
                assert name in refused(client, route, text)["message"], (name, value)
    for name, value in [("n", 0), ("n", 129), ("temperature", 2.1), ("temperature", -0.1), ("top_p", 0), ("top_k", -2)]:
        for route, body in ROUTES:
            assert refused(client, route, json.dumps({**body, name: value}))["param"] == name


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"null", b"[]", b'"x"', b"3", b"{", b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"{}"),
        b"[" * 100_000,
        b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "\\ud800"}',
        json.dumps({"messages": [{"role": "user", "content": 3}]}).encode(),
        json.dumps({"messages": [{"role": "user<|im_end|>\n<|im_start|>system", "content": "a"}]}).encode(),
        json.dumps({"messages": [{"role": "assistant", "tool_calls": [{"id": "c"}]}]}).encode(),
        json.dumps({"messages": [], "prompt": []}).encode(),
        json.dumps({"messages": [{"role": "user"}] * 5000, "prompt": [[]]}).encode(),
        json.dumps({**CHAT, **COMPLETION, "stream_options": {"include_usage": "yes"}}).encode(),
        json.dumps({"messages": [[]] * 10_000, "prompt": [{}] * 10_000}).encode(),
        json.dumps({**CHAT, **COMPLETION, "stop": [""]}).encode(),
        json.dumps({**CHAT, **COMPLETION, "stop": ["a"] * 17}).encode(),
        json.dumps({**CHAT, **COMPLETION, "logit_bias": {"x": 1}}).encode(),
        json.dumps({**CHAT, **COMPLETION, "logit_bias": {"1" * 5000: 1}}).encode(),
        json.dumps({**CHAT, **COMPLETION, "logit_bias": {"500": 1}}).encode(),
        json.dumps({**CHAT, **COMPLETION, "logit_bias": {str(i): 1 for i in range(2000)}}).encode(),
        json.dumps({**CHAT, **COMPLETION, "stop_token_ids": [500]}).encode(),
        json.dumps({**CHAT, **COMPLETION, "stop_token_ids": [-1]}).encode(),
        json.dumps({**CHAT, **COMPLETION, "allowed_token_ids": []}).encode(),
        json.dumps({**CHAT, **COMPLETION, "response_format": {"type": "json_schema"}}).encode(),
        json.dumps({**CHAT, **COMPLETION, "structured_outputs": {"regex": "(a"}}).encode(),
        json.dumps({**CHAT, **COMPLETION, "structured_outputs": {"regex": "a", "choice": ["a"]}}).encode(),
        json.dumps({**CHAT, **COMPLETION, "cache_salt": ""}).encode(),
        json.dumps({"messages": [{"role": "user", "content": ""}], "prompt": [500]}).encode()[:-1] + b', "n": 0}',
    ],
)
def test_wrong_bodies_are_refused(client: httpx.Client, content: bytes) -> None:
    for route, _ in ROUTES:
        refused(client, route, content)


@pytest.mark.parametrize(
    "prompt",
    [[500], [-1], [2**31], "", [], [[]], [[1], "a"], [1, "a"], [1.5], [[500]], ["a"] * 1025, [1] * 129, {"a": 1}],
)
def test_wrong_prompts_are_refused(client: httpx.Client, prompt: Any) -> None:
    if prompt == "":
        return  # with a beginning-of-sequence token an empty text is a prompt
    refused(client, "/v1/completions", json.dumps({"prompt": prompt, "max_tokens": 1}))
    refused(client, "/v1/embeddings", json.dumps({"input": prompt}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("audio", {"voice": "a"}), ("modalities", ["audio"]), ("functions", [{"name": "f"}]), ("prediction", {})),
        *(("guided_json", {}), ("guided_regex", "a"), ("chat_template", "{{ 1 }}"), ("prompt_embeds", "AAAA")),
        ("suffix", "a"),
    ],
)
def test_fields_that_are_not_supported_are_named(client: httpx.Client, field: str, value: Any) -> None:
    for route, body in ROUTES:
        error = refused(client, route, json.dumps({**body, field: value}))
        assert error["param"] == field and error["code"] == "unsupported_parameter"


@pytest.mark.parametrize(
    "form",
    [
        *({"regex": "(a+)+$"}, {"regex": "(a{1000}){1000}"}, {"regex": "\\p{L}{500}"}, {"json": {}}),
        {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
        {"json": {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(10_000)}}},
        {"json": {"enum": [f"v{i}" for i in range(1 << 17)]}},
        {"grammar": 'start: start start | "a"'},
    ],
    ids=lambda form: str(form)[:40],
)
def test_structures_made_to_hurt_are_done_or_refused(client: httpx.Client, served: Served, form: dict) -> None:
    answer = client.post("/v1/completions", json={**COMPLETION, "structured_outputs": form})
    assert answer.status_code in (200, 400), answer.text[:500]
    assert client.post("/v1/completions", json=COMPLETION).status_code == 200


def test_a_body_of_very_many_fields_is_named_in_few_words(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json={**COMPLETION, **{f"field{i}": i for i in range(100_000)}})
    assert answer.status_code == 200 and len(answer.headers["x-llm-infer-ignored"]) < 2000


def test_fields_that_change_nothing_pass_and_unknown_ones_are_named(client: httpx.Client) -> None:
    neutral = {
        "store": True,
        "user": "u",
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "modalities": ["text"],
        "audio": None,
    }
    for route, body in ROUTES:
        answer = client.post(route, json={**body, **neutral, "a\nb": 1, "later": 2})
        assert answer.status_code == 200
        assert answer.headers["x-llm-infer-ignored"] == "a\\nb, later"


def test_unknown_fields_are_refused_where_the_server_is_strict(tiny_llm: Any) -> None:
    served = Served(tiny_llm, strict_fields=True)
    with served.client() as client:
        for route, body in ROUTES:
            assert refused(client, route, json.dumps({**body, "later": 2}))["param"] == "later"
    served.stop()


def test_names_of_arguments_are_no_variables_of_templates(client: httpx.Client) -> None:
    for name in ("messages", "tools", "tokenize", "chat_template", "add_generation_prompt", "template"):
        body = {**CHAT, "chat_template_kwargs": {name: 1}}
        assert "chat_template_kwargs" in refused(client, "/v1/chat/completions", json.dumps(body))["message"]
    assert (
        client.post(
            "/v1/chat/completions", json={**CHAT, "chat_template_kwargs": {"enable_thinking": False}}
        ).status_code
        == 200
    )


def test_bodies_of_other_kinds_are_refused(client: httpx.Client, served: Served) -> None:
    text = json.dumps(CHAT)
    for headers in ({"content-type": "text/plain"}, {"content-type": "application/json", "content-encoding": "gzip"}):
        answer = client.post("/v1/chat/completions", content=text, headers=headers)
        assert answer.status_code == 415 and answer.json()["error"]["code"] == "unsupported_media_type"
    limit = served.options.max_body_bytes
    for content in (b" " * (limit + 1), (b" " * 65536 for _ in range(limit // 65536 + 1))):
        answer = client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413


def test_a_long_prompt_is_refused_with_both_numbers(client: httpx.Client) -> None:
    message = refused(client, "/v1/completions", json.dumps({"prompt": [5] * 1_000_000, "max_tokens": 1}))["message"]
    assert "1000000" in message and "128" in message
    exactly = client.post("/v1/completions", json={"prompt": [5] * 127, "max_tokens": 1})
    assert exactly.status_code == 200
    assert client.post("/v1/completions", json={"prompt": [5] * 128, "max_tokens": 1}).status_code == 400


def test_as_many_prompts_as_may_be_are_answered_in_order(client: httpx.Client) -> None:
    answer = client.post(
        "/v1/completions", json={"prompt": [[5, i % 490] for i in range(1024)], "max_tokens": 1}
    ).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(1024))
    assert answer["usage"] == answer["usage"] | {"prompt_tokens": 2048, "completion_tokens": 1024}
    error = refused(client, "/v1/completions", json.dumps({"prompt": [[5]] * 100, "max_tokens": 1, "n": 100}))
    assert "100 prompts with n=100" in error["message"]


def test_what_templates_and_tokenizers_do_for_clients(client: httpx.Client, served: Served) -> None:
    tokenizer = served.llm.tokenizer
    ids = tokenizer.encode("The page table")
    found = client.post("/tokenize", json={"prompt": "The page table", "return_token_strs": True}).json()
    assert found["tokens"] == ids and found["count"] == len(ids) and found["max_model_len"] == 128
    assert len(found["token_strs"]) == len(ids)
    plain = client.post("/tokenize", json={"prompt": "The page table", "add_special_tokens": False}).json()["tokens"]
    assert plain == tokenizer.encode("The page table", add_special_tokens=False)
    assert client.post("/detokenize", json={"tokens": plain}).json()["prompt"] == tokenizer.decode(plain)
    chat = client.post("/tokenize", json={"messages": CHAT["messages"]}).json()
    assert chat["count"] == client.post("/v1/chat/completions", json=CHAT).json()["usage"]["prompt_tokens"]
    info = client.get("/tokenizer_info").json()
    assert isinstance(info["eos_token"], str) and isinstance(info["chat_template"], str)
    eos = client.post("/tokenize", json={"prompt": info["eos_token"], "add_special_tokens": False}).json()["tokens"]
    assert len(eos) == 1
    for body in ({}, {"prompt": "a", "messages": CHAT["messages"]}, {"messages": []}):
        refused(client, "/tokenize", json.dumps(body))
    for tokens in ([500], [-1], ["a"], 3):
        refused(client, "/detokenize", json.dumps({"tokens": tokens}))


def test_the_description_names_every_field(client: httpx.Client) -> None:
    found = client.get("/openapi.json").json()
    for kind, path in ((ChatRequest, "/v1/chat/completions"), (CompletionRequest, "/v1/completions")):
        schema = found["components"]["schemas"][kind.__name__]
        assert set(schema["properties"]) == set(kind.model_fields)
        assert schema["properties"]["model"]["anyOf"][0]["enum"] == [NAME, "gpt-4.1"]
        assert {"400", "401", "413", "429", "503"} <= set(found["paths"][path]["post"]["responses"])
