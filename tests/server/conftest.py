"""A tiny model with a real vocabulary behind the real server, on a thread of the test's process."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn

from llm_infer import LLM
from llm_infer.options import EngineOptions
from llm_infer.server.app import make_app
from llm_infer.server.options import ServerOptions
from llm_infer.server.run import BoundedProtocol
from llm_infer.server.service import Service
from tests.weights.tiny_models import hf_tensors, write_gguf

GOLDENS = Path(__file__).parents[1] / "goldens" / "sentencepiece_500.json"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAME = "tiny"


class Served:
    """A server that runs; `stop` ends it.

    Attributes:
        url: where it is.
        service: what its routes share; to be looked at only.
        llm: the same model offline. It shares the session, so both take turns at the engine.
    """

    def __init__(self, llm: LLM, **options: Any) -> None:
        self.llm = llm
        given = {"chat_template": CHATML, "served_model_names": (NAME, "gpt-4.1"), "warm_up": "none", **options}
        self.options = ServerOptions(**given)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        assert self._ready.wait(300)

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        prepared = lambda _: (self.llm.tokenizer, self.llm._session)  # noqa: E731
        self.service = Service(EngineOptions(model=NAME), self.options, prepare=prepared)
        config = uvicorn.Config(
            make_app(self.service),  # type: ignore[arg-type]
            port=0,
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=2,
        )
        self.server = uvicorn.Server(config)
        self.service.begin()
        serving = asyncio.ensure_future(self.server.serve())
        while not self.server.started or self.service.state in ("loading", "compiling"):
            await asyncio.sleep(0.005)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._ready.set()
        await serving
        await self.service.close()

    def client(self, **options: Any) -> httpx.Client:
        """Makes a client of the server."""
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def is_idle(self) -> bool:
        """Whether nothing runs, and all pages are free or kept for their prefixes."""
        engine, service = self.llm.engine, self.service
        return not (engine.has_work or engine.scheduler.requests or service._tickets or service._queued_requests)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Waits until something holds."""

        async def poll() -> bool:
            for _ in range(int(seconds * 200)):
                if condition():
                    return True
                await asyncio.sleep(0.005)
            return False

        assert asyncio.run_coroutine_threadsafe(poll(), self.loop).result(seconds + 5)

    def stop(self) -> None:
        """Ends the server."""
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a tiny Llama with random weights and a vocabulary of 500 pieces."""
    vocabulary = json.loads(GOLDENS.read_text(encoding="utf-8"))["vocabulary"]
    tensors = hf_tensors(vocab_size=len(vocabulary["tokenizer.ggml.tokens"]), seed=1)
    tensors = {name: values * 0.1 if values.ndim == 2 else values for name, values in tensors.items()}
    return write_gguf(tmp_path_factory.mktemp("served") / "tiny.gguf", tensors, vocabulary=vocabulary)


@pytest.fixture(scope="session")
def tiny_llm(tiny_gguf: Path) -> LLM:
    """The model in an engine of eight rows and 64 pages; tests share its programs."""
    return LLM(
        tiny_gguf,
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        num_pages=64,
        policy="priority",
        progress=False,
    )


@pytest.fixture(scope="session")
def served(tiny_llm: LLM) -> Iterator[Served]:
    """A server that all tests share which leave it as it was."""
    found = Served(tiny_llm)
    yield found
    found.stop()


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    """A client of the shared server."""
    with served.client() as found:
        yield found
