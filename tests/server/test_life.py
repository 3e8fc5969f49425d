"""Clients that leave, queues that are full, an engine that fails: pages come back, and nobody waits for ever."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from llm_infer import LLM
from llm_infer.server.engine_thread import MAX_FAILED_STEPS
from tests.server.conftest import NAME, Served

LONG: dict[str, Any] = {"prompt": [9] * 20, "max_tokens": 100, "ignore_eos": True, "seed": 1}


def metric(served: Served, name: str, **labels: str) -> float:
    with served.client() as client:
        text = client.get("/metrics").text
    found = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"llm_infer:{name}" and labels.items() <= sample.labels.items()
    ]
    return sum(found)


def sent(served: Served, body: dict[str, Any], route: str = "/v1/completions") -> socket.socket:
    """A connection that has sent a request and read nothing."""
    connection = socket.create_connection(("127.0.0.1", served.port))
    data = json.dumps(body).encode()
    head = f"POST {route} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def books_are_clean(served: Served) -> None:
    served.wait_until(served.is_idle)
    scheduler = served.llm.engine.scheduler
    scheduler.check()
    assert scheduler.usage() == 0.0 and scheduler.num_running == scheduler.num_waiting == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 4])
def test_whoever_leaves_gives_back_pages(served: Served, stream: bool, n: int) -> None:
    aborted = metric(served, "request_success_total", finished_reason="abort")
    for steps in (0, 1, 3, 8):
        before = served.llm.engine.times.steps
        connection = sent(served, {**LONG, "stream": stream, "n": n})
        served.wait_until(lambda: served.llm.engine.times.steps >= before + steps)  # noqa: B023
        connection.close()
        served.wait_until(served.is_idle)
        assert served.llm.engine.times.steps < before + 90  # it did not run to its end
    books_are_clean(served)
    # Who left at once may have left before there was anything to abort.
    assert metric(served, "request_success_total", finished_reason="abort") - aborted in (3, 4)


def test_who_leaves_the_queue_was_never_there(served: Served) -> None:
    busy = sent(served, {**LONG, "n": 8})
    served.wait_until(lambda: served.llm.engine.scheduler.num_running == 8)
    waiting = sent(served, {**LONG, "prompt": [9] * 30})
    served.wait_until(lambda: served.service._queued_tokens == 30 or served.is_idle())
    waiting.close()
    served.wait_until(lambda: served.service._queued_tokens == 0)
    busy.close()
    books_are_clean(served)


def test_who_leaves_while_a_grammar_compiles(served: Served) -> None:
    schema = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(500)}}
    connection = sent(served, {**LONG, "structured_outputs": {"json": schema}})
    served.wait_until(lambda: served.service.num_active == 1)
    connection.close()
    served.wait_until(lambda: served.service.num_active == 0)
    books_are_clean(served)


def test_half_a_body_and_half_a_request_leave_nothing(served: Served) -> None:
    for data in (
        b"",
        b"POST /v1/completions HT",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n\r\n{",
    ):
        connection = socket.create_connection(("127.0.0.1", served.port))
        connection.sendall(data)
        connection.close()
    books_are_clean(served)
    served.wait_until(lambda: served.service.num_active == 0)


def test_a_slow_body_is_given_up(tiny_llm: LLM) -> None:
    served = Served(tiny_llm, body_timeout=0.2)
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.settimeout(20)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n\r\n{")
        assert b" 408 " in connection.recv(65536)
    served.stop()


def test_a_reader_that_stalls_is_given_up(tiny_llm: LLM) -> None:
    served = Served(tiny_llm, stall_timeout=0.3)
    body = {**LONG, "stream": True, "n": 8, "logprobs": 20, "max_tokens": 100}
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", served.port))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    served.wait_until(lambda: served.service.num_active == 1)
    served.wait_until(lambda: served.service.num_active == 0, 60)
    books_are_clean(served)
    connection.close()
    served.stop()


def test_what_is_too_much_is_refused_and_clients_come_again(tiny_llm: LLM) -> None:
    served = Served(tiny_llm, max_num_queued_requests=2)
    with ThreadPoolExecutor(24) as pool, served.client() as client:
        answers = list(pool.map(lambda _: client.post("/v1/completions", json={**LONG, "max_tokens": 20}), range(24)))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                assert 1 <= int(answer.headers["retry-after"]) <= 120
                assert answer.json()["error"]["type"] == "rate_limit_error"
        with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=5) as patient:
            ask = lambda _: patient.completions.create(model=NAME, prompt=[9] * 20, max_tokens=20)  # noqa: E731
            assert len(list(pool.map(ask, range(6)))) == 6
    assert metric(served, "admission_rejections_total", reason="requests") >= statuses.count(429)
    books_are_clean(served)
    served.stop()


def test_tokens_that_wait_are_bounded(tiny_llm: LLM) -> None:
    served = Served(tiny_llm, max_num_queued_tokens=100, overload_status=503)
    with served.client() as client:
        assert client.post("/v1/completions", json={"prompt": [[9] * 100] * 8, "max_tokens": 1}).status_code == 200
        busy = [sent(served, {**LONG, "n": 8})]
        served.wait_until(lambda: served.service.stats.running > 0)
        busy.append(sent(served, {**LONG, "prompt": [8] * 90, "max_tokens": 38}))
        served.wait_until(lambda: served.service._queued_tokens >= 90)
        answer = client.post("/v1/completions", json={"prompt": [9] * 20, "max_tokens": 1})
        assert answer.status_code == 503 and "retry-after" in answer.headers
    for connection in busy:
        connection.close()
    books_are_clean(served)
    served.stop()


def test_a_request_may_take_only_so_long(tiny_llm: LLM) -> None:
    served = Served(tiny_llm, request_timeout=0.02)
    with served.client() as client:
        answer = client.post("/v1/completions", json={**LONG, "n": 8})
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        answer = client.post("/v1/completions", json={**LONG, "n": 8, "stream": True})
        last = answer.text.strip().split("\n\n")[-1].removeprefix("data: ")
        assert json.loads(last)["error"]["code"] == "timeout"
    books_are_clean(served)
    served.stop()


def test_draining_lets_requests_end_and_no_other_in(tiny_llm: LLM) -> None:
    served = Served(tiny_llm)
    with ThreadPoolExecutor(1) as pool, served.client() as client:
        running = pool.submit(client.post, "/v1/completions", json=LONG)
        served.wait_until(lambda: served.service.stats.running > 0)
        served.loop.call_soon_threadsafe(served.service.drain)
        served.wait_until(lambda: served.service.state == "draining")
        refused = client.post("/v1/completions", json=LONG)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        health = client.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "draining"
        assert client.get("/live").status_code == 200
        assert running.result().json()["usage"]["completion_tokens"] == 100
    served.stop()


def test_a_step_that_fails_ends_its_requests_alone(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(tiny_llm)
    engine, failures = tiny_llm.engine, iter([True])
    step = engine._step

    def failing() -> Any:
        if engine.scheduler.num_running and next(failures, False):
            raise RuntimeError("the device is on fire")
        return step()

    monkeypatch.setattr(engine, "_step", failing)
    with served.client() as client:
        answer = client.post("/v1/completions", json=LONG)
        assert answer.status_code == 500 and "on fire" in answer.json()["error"]["message"]
        assert client.post("/v1/completions", json=LONG).status_code == 200
        assert client.get("/health").status_code == 200
    books_are_clean(served)
    served.stop()


def test_an_engine_that_keeps_failing_is_dead(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(tiny_llm)
    engine, count = tiny_llm.engine, 0

    def failing() -> Any:
        nonlocal count
        count += 1
        raise RuntimeError("the device is on fire")

    with served.client() as client:
        stream = client.stream("POST", "/v1/completions", json={**LONG, "stream": True})
        with stream as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith(("data: ", ": "))
            monkeypatch.setattr(engine, "_step", failing)
            rest = [line for line in lines if line]
            assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "engine_error"
        while client.get("/health").json()["status"] != "dead":
            assert client.post("/v1/completions", json=LONG).status_code in (500, 503)
        assert count == MAX_FAILED_STEPS
        assert client.get("/health").status_code == client.get("/live").status_code == 503
        assert client.post("/v1/completions", json=LONG).json()["error"]["code"] == "dead"
        assert served.service.ended.is_set()
    monkeypatch.undo()
    engine.start_anew("test")
    served.stop()


def test_metrics_are_those_that_clients_see(served: Served) -> None:
    before = {
        name: metric(served, name) for name in ("prompt_tokens_total", "generation_tokens_total", "engine_steps_total")
    }
    with served.client() as client:
        used = [
            client.post("/v1/completions", json={"prompt": [i, 9], "max_tokens": 7, "ignore_eos": True}).json()["usage"]
            for i in range(4, 9)
        ]
    assert metric(served, "prompt_tokens_total") - before["prompt_tokens_total"] == sum(
        one["prompt_tokens"] for one in used
    )
    new = metric(served, "generation_tokens_total") - before["generation_tokens_total"]
    assert new == sum(one["completion_tokens"] for one in used) == 35
    assert metric(served, "engine_steps_total") - before["engine_steps_total"] >= 35
    served.wait_until(lambda: served.service.stats.running == 0)
    assert metric(served, "num_requests_running") == metric(served, "num_requests_waiting") == 0


@pytest.fixture
def crowded(tiny_llm: LLM) -> Iterator[Served]:
    """A server whose pool is so small that sequences keep losing their pages."""
    from llm_infer.config import SchedulerConfig
    from llm_infer.scheduler.scheduler import Scheduler

    engine, before = tiny_llm.engine, tiny_llm.engine.scheduler
    engine.scheduler = Scheduler(
        SchedulerConfig(8, 32, 128, "priority"),
        num_pages=12,
        page_size=16,
        max_model_len=128,
        enable_prefix_caching=True,
    )
    served = Served(tiny_llm)
    yield served
    served.stop()
    engine.scheduler = before


@pytest.mark.parametrize(("clients", "visits"), [(24, 150), pytest.param(300, 1500, marks=pytest.mark.sweep)])
def test_chaos_changes_no_text_and_loses_no_page(crowded: Served, clients: int, visits: int) -> None:
    draw = random.Random(5)
    bodies = [
        {
            "prompt": [draw.choice([5, 6]) for _ in range(draw.randrange(1, 40))],
            "max_tokens": draw.randrange(20, 60),
            "ignore_eos": True,
            "seed": number,
            "stream": draw.random() < 0.5,
            "n": draw.choice([1, 1, 2]),
        }
        for number in range(24)
    ]
    with crowded.client() as client:
        alone = [client.post("/v1/completions", json={**body, "stream": False}).json() for body in bodies]
    wrong: list[str] = []

    def visit(number: int) -> None:
        own = random.Random(number)
        body = bodies[number % len(bodies)]
        if own.random() < 1 / 3:
            connection = sent(crowded, body)
            time.sleep(own.random() * 0.2)
            connection.close()
            return
        with crowded.client() as client:
            if own.random() < 0.1:
                broken = json.dumps(body)[: own.randrange(1, 40)]
                assert (
                    client.post(
                        "/v1/completions", content=broken, headers={"content-type": "application/json"}
                    ).status_code
                    == 400
                )
                return
            answer = client.post("/v1/completions", json=body)
            texts = [""] * body["n"]
            if body["stream"]:
                for line in answer.text.split("\n\n"):
                    if line.startswith("data: {"):
                        for choice in json.loads(line[6:])["choices"]:
                            texts[choice["index"]] += choice["text"]
            else:
                texts = [choice["text"] for choice in answer.json()["choices"]]
            if texts != [choice["text"] for choice in alone[number % len(bodies)]["choices"]]:
                wrong.append(f"{body}: {texts}")

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(visit, range(visits)))
    assert not wrong
    assert crowded.llm.engine.scheduler.num_preemptions > 20
    books_are_clean(crowded)


def test_a_new_kind_of_request_stops_nobody(served: Served) -> None:
    """Programs that are missing are compiled beside the steps: streams go on meanwhile."""
    steps: list[int] = []
    done = threading.Event()

    def count() -> None:
        while not done.is_set():
            steps.append(served.llm.engine.times.steps)
            time.sleep(0.005)

    programs = len(served.llm.engine.runner._programs)
    with ThreadPoolExecutor(2) as pool, served.client() as client:
        watched = pool.submit(count)
        streams = pool.submit(client.post, "/v1/completions", json={**LONG, "n": 3})
        served.wait_until(lambda: served.service.stats.running > 0)
        body = {
            "prompt": [7, 8, 9],
            "max_tokens": 2,
            "prompt_logprobs": 2,
            "logit_bias": {"5": 1},
            "min_tokens": 1,
            "logprobs": 1,
        }
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200 and len(answer.json()["choices"][0]["prompt_logprobs"]) == 3
        assert streams.result().status_code == 200
        done.set()
        watched.result()
    assert len(served.llm.engine.runner._programs) > programs
    assert len(set(steps)) > 10


def test_long_work_keeps_no_one_from_asking_for_health(served: Served) -> None:
    slowest = 0.0
    with ThreadPoolExecutor(1) as pool, served.client() as client, httpx.Client(base_url=served.url) as second:
        work = pool.submit(client.post, "/tokenize", json={"prompt": "The page table maps pages. " * 20_000})
        while not work.done():
            started = time.perf_counter()
            assert second.get("/health").status_code == 200
            slowest = max(slowest, time.perf_counter() - started)
        assert work.result().json()["count"] > 100_000
    assert slowest < 5.0  # generous: other tests run beside this one


def test_figures_grow_while_a_request_runs(served: Served) -> None:
    tokens, firsts = metric(served, "generation_tokens_total"), metric(served, "time_to_first_token_seconds_count")
    prompts = [[9] * 4] * 400
    connection = sent(served, {"prompt": prompts, "max_tokens": 100, "ignore_eos": True})
    served.wait_until(lambda: served.service.stats.new_tokens > tokens + 100)
    assert metric(served, "time_to_first_token_seconds_count") > firsts
    connection.close()
    books_are_clean(served)
    assert metric(served, "generation_tokens_total") > tokens + 100  # though it was aborted


def test_defaults_of_the_server_hold_for_who_names_none(tiny_llm: LLM) -> None:
    served = Served(tiny_llm, default_sampling={"temperature": 0, "max_new_tokens": 5})
    with served.client() as client:
        chat = {"messages": [{"role": "user", "content": "The page"}], "ignore_eos": True}
        texts = {
            client.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"] for _ in range(3)
        }
        answer = client.post("/v1/chat/completions", json={**chat, "max_tokens": 7, "temperature": 1}).json()
    assert len(texts) == 1 and answer["usage"]["completion_tokens"] == 7
    served.stop()
