"""Models of the Hugging Face hub, which a local server plays; the client runs in processes of its own because the
library reads its settings at import."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from llm_infer.weights.sources import ModelSource, open_model
from tests.weights.tiny_models import CONFIG

ROOT = Path(__file__).parents[2]
SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """As much of the hub's HTTP interface as a download uses."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        self.repositories = repositories
        self.served: list[str] = []
        super().__init__(("127.0.0.1", 0), _HubHandler)


class _HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        for name, files in self.server.repositories.items():
            if path.startswith(f"/api/models/{name}/tree/"):
                entries = [{"type": "file", "path": f, "size": len(b), "oid": _oid(b)} for f, b in files.items()]
                return self._answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
            if path.startswith(f"/api/models/{name}"):
                siblings = [{"rfilename": f, "size": len(b), "blobId": _oid(b)} for f, b in files.items()]
                info = {"_id": "1", "id": name, "sha": SHA, "siblings": siblings, "private": False, "tags": []}
                return self._answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            prefix = f"/{name}/resolve/{SHA}/"
            if path.startswith(prefix):
                filename = path.removeprefix(prefix)
                if self.command == "GET":
                    self.server.served.append(filename)
                return self._answer(200, files[filename], {"ETag": f'"{_oid(files[filename])}"', "X-Repo-Commit": SHA})
        return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _resolve_in_subprocess(names: list[str], endpoint: str, home: Path, **environment: str) -> list[str]:
    """For each name its path or the error's message. Each must be there within 10 s."""
    script = (
        "import json, sys, time\n"
        "from llm_infer.base.errors import ModelError\n"
        "from llm_infer.weights.sources import resolve\n"
        "import huggingface_hub\n"
        "results = []\n"
        "for name in sys.argv[1:]:\n"
        "    started = time.perf_counter()\n"
        "    try: results.append(str(resolve(name).path))\n"
        "    except ModelError as error: results.append(f'ModelError: {error}')\n"
        "    assert time.perf_counter() - started < 10\n"
        "print(json.dumps(results))\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *names],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**kept, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_hub(tmp_path: Path) -> None:
    save_file({"w": np.ones((2, 2), np.float32)}, tmp_path / "w.safetensors")
    weights = (tmp_path / "w.safetensors").read_bytes()
    good = {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors": weights,
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "README.md": b"not needed",
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": weights,
        "onnx/model.onnx": b"other format",
        "onnx/config.json": b"{}",
    }
    hub = Hub({"org/good": good, "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"x"}})
    hub.repositories["org/quantised"] = {"m.gguf": b"x"}
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    endpoint, home = f"http://127.0.0.1:{hub.server_port}", tmp_path / "home"
    try:
        names = ["org/good", "org/pickled", "org/quantised", "org/absent"]
        path, *errors = _resolve_in_subprocess(names, endpoint, home)
    finally:
        hub.shutdown()
        hub.server_close()
    fetched = sorted(p.name for p in Path(path).iterdir())
    assert fetched == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(hub.served) == fetched
    assert list(open_model(ModelSource("org/good", "huggingface", Path(path))).tensors.names) == ["w"]
    for error, message in zip(
        errors,
        [
            "ModelError: .*no safetensors weights.*never loaded",
            "ModelError: .*holds GGUF files: download one",
            "ModelError: no local path 'org/absent' and no such model on the Hugging Face hub",
        ],
        strict=True,
    ):
        assert re.match(message, error), error

    # The server is gone: what was fetched is still there, anything else is one clear error.
    good, other = _resolve_in_subprocess(["org/good", "org/other"], endpoint, home)
    assert good == path
    assert other.startswith("ModelError: no local path 'org/other', the Hugging Face hub cannot be reached (")
    assert "local GGUF file or Hugging Face directory" in other and "\n" not in other
    good, other = _resolve_in_subprocess(["org/good", "org/other"], endpoint, home, HF_HUB_OFFLINE="1")
    assert good == path
    assert "HF_HUB_OFFLINE=1 forbids network use" in other
