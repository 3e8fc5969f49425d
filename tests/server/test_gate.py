"""Who may ask: keys on every route but three, names of hosts, headers within bounds, ids in and out."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest

from llm_infer import LLM
from llm_infer.base.errors import UserError
from llm_infer.server import logs
from llm_infer.server.app import ROUTES
from llm_infer.server.gate import MAX_HEADERS
from llm_infer.server.options import OPEN, ServerOptions, read_api_keys
from tests.server.conftest import NAME, Served

KEY, OTHER = "sk-one", "sk-two"


@pytest.fixture(scope="module")
def locked(tiny_llm: LLM) -> Iterator[Served]:
    served = Served(tiny_llm, api_keys=(KEY, OTHER), allowed_origins=("https://page.example",))
    yield served
    served.stop()


@pytest.mark.parametrize(
    "headers",
    [
        *(
            {},
            {"authorization": "Bearer"},
            {"authorization": f"Bearer {KEY[:-1]}"},
            {"authorization": f"Bearer {KEY}x"},
        ),
        *({"authorization": f"Basic {KEY}"}, {"x-api-key": "wrong"}, {"authorization": KEY}),
        {"authorization": f"Bearer {KEY}", "x-api-key": "wrong"},
    ],
)
def test_no_route_answers_without_a_key(locked: Served, headers: dict[str, str]) -> None:
    paths = [route.path for route in ROUTES] + [
        "/nope",
        "/v1/nope",
        "/health/",
        "//health",
        "/health/../metrics",
        "/Health",
    ]
    with locked.client() as client:
        for path in paths:
            for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE"):
                answer = client.request(method, path, headers=headers)
                if path in OPEN:
                    assert answer.status_code != 401
                else:
                    assert answer.status_code == 401, (method, path)
                    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers", [{"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer {OTHER}"}, {"x-api-key": KEY}]
)
def test_any_of_the_keys_opens(locked: Served, headers: dict[str, str]) -> None:
    with locked.client(headers=headers) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == NAME


def test_keys_share_no_cached_prefixes(locked: Served) -> None:
    cached = []
    with locked.client() as client:
        for key in (KEY, KEY, OTHER, OTHER):
            body = {"prompt": [91] * 40, "max_tokens": 1}
            answer = client.post("/v1/completions", json=body, headers={"x-api-key": key}).json()
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached == [0, 32, 0, 32]


def test_only_pages_that_were_named_may_ask(locked: Served) -> None:
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    with locked.client() as client:
        good = client.options("/v1/completions", headers={"origin": "https://page.example", **asks})
        assert good.headers["access-control-allow-origin"] == "https://page.example"
        bad = client.options("/v1/completions", headers={"origin": "https://other.example", **asks})
        assert "access-control-allow-origin" not in bad.headers


def test_hosts_that_are_not_this_machine_are_refused(served: Served) -> None:
    with served.client() as client:
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", ""):
            assert client.get("/v1/models", headers={"host": host}).status_code == 403
        for host in ("localhost", "LOCALHOST:1", f"127.0.0.1:{served.port}", "[::1]:8000"):
            assert client.get("/v1/models", headers={"host": host}).status_code == 200


def test_each_answer_has_an_id_that_forges_no_log(served: Served) -> None:
    with served.client() as client:
        assert client.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
        for forged in (b"a b", b"\xff", b"x" * 129):
            assert client.get("/health", headers=[(b"x-request-id", forged)]).headers["x-request-id"].isalnum()
        assert client.get("/nope").headers["x-request-id"]


def test_too_many_headers_are_refused(served: Served) -> None:
    with served.client() as client:
        many = [(f"x-{i}", "a") for i in range(MAX_HEADERS)]
        assert client.get("/health", headers=many).status_code == 431
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.settimeout(20)
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n")
            while True:
                connection.sendall(b"x-a: " + b"a" * 1000 + b"\r\n")
        except OSError:
            pass  # it hung up
        else:
            raise AssertionError("headers without end were taken")


def test_methods_and_routes_that_are_not_there(client: httpx.Client) -> None:
    answer = client.get("/v1/completions")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"
    assert answer.json()["error"]["code"] == "method_not_allowed"
    assert client.head("/").status_code == 200 and client.head("/").content == b""
    assert client.get("/v1/nope").json()["error"]["code"] == "route_not_found"
    assert client.post("/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200  # without /v1


def test_a_hundred_requests_share_a_connection(client: httpx.Client, served: Served) -> None:
    before = len(served.server.server_state.connections)
    for _ in range(100):
        assert client.get("/health").json()["status"] == "ready"
    assert len(served.server.server_state.connections) <= before + 1


def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        one = b"GET /%s HTTP/1.1\r\nhost: localhost\r\n%s\r\n"
        connection.sendall(one % (b"health", b"") + one % (b"version", b"connection: close\r\n"))
        connection.settimeout(20)
        data = b""
        while part := connection.recv(65536):
            data += part
    assert data.index(b'"status"') < data.index(b'"version"')


def test_keys_come_from_flags_files_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nsk-a\n\n sk-b \n")
    monkeypatch.setenv("LLM_INFER_API_KEY", "sk-c")
    assert read_api_keys(("sk-d", "sk-a"), str(file)) == ("sk-d", "sk-a", "sk-c", "sk-b")
    file.write_text("# none\n")
    with pytest.raises(UserError, match="has no key"):
        read_api_keys((), str(file))
    for wrong in (
        {"api_keys": ("a b",)},
        {"port": 70000},
        {"overload_status": 500},
        {"ssl_keyfile": "k"},
        {"warm_up": "x"},
    ):
        with pytest.raises(UserError):
            ServerOptions(**wrong)  # type: ignore[arg-type]
    for values in (
        {"keep_alive": float("nan")},
        {"sse_keep_alive": 0.0},
        {"shutdown_timeout": -1.0},
        {"metrics_prefix": ""},
        {"served_model_names": ("",)},
        {"default_sampling": {"temperature": "hot"}},
        {"default_sampling": {"top_p": 2}},
        {"default_sampling": {"n": 2}},
    ):
        with pytest.raises(UserError):
            ServerOptions(**values)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not valid Jinja"):
        ServerOptions(chat_template="{% for m in messages %}")
    with pytest.raises(UserError, match="messages"):
        ServerOptions(default_chat_template_kwargs={"messages": 1})
    assert "sk-a" not in repr(ServerOptions(api_keys=("sk-a",)))


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_client_forges_a_line_of_the_log(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger(logs.LOGGER)
    try:
        logs.set_up(form, requests=True)
        logs.request_ended(log, id="a\nFORGED\x1b[31m", method="GET\r", route="/v1", status=200, seconds=0.5)
        log.error("bad \n\u2028 text")
    finally:
        log.handlers.clear()
        logging.getLogger("uvicorn.error").handlers.clear()
        log.propagate = logging.getLogger("uvicorn.error").propagate = True
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.isprintable() for line in lines)
    if form == "json":
        assert json.loads(lines[0])["status"] == 200 and json.loads(lines[1])["level"] == "error"
    else:
        assert "/v1 200 0.500 s" in lines[0] and "error: bad" in lines[1]
