"""A Hugging Face hub on this machine: as much of its HTTP interface as downloads use, with faults on demand.

Clients run in processes of their own, because the hub's library reads its settings at import.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHA = "0123456789abcdef0123456789abcdef01234567"
OLD_SHA = "fedcba9876543210fedcba9876543210fedcba98"

Files = Mapping[str, bytes]


class Hub(ThreadingHTTPServer):
    """Serves repositories: name → path → content.

    Attributes:
        old: repositories as they were at the tag "v1".
        served: files that were asked for, in order; where only the rest of one was, with its first byte ("m.gguf 1000").
        drop_after: bytes after which each answer with a file breaks off, or None.
        hold_after: bytes after which an answer with a file waits for `release`, or None.
        damaged: files of which one byte arrives wrong.
        whole_only: answer requests for the rest of a file with all of it.
    """

    daemon_threads = True

    def __init__(self, repositories: Mapping[str, Files], old: Mapping[str, Files] | None = None) -> None:
        self.repositories, self.old = dict(repositories), dict(old or {})
        self.served: list[str] = []
        self.drop_after: int | None = None
        self.hold_after: int | None = None
        self.release = threading.Event()
        self.damaged: set[str] = set()
        self.whole_only = False
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def endpoint(self) -> str:
        """Value of HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing of clients that have gone."""


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        for name in self.server.repositories:
            for revision, sha in (("main", SHA), ("v1", OLD_SHA), (SHA, SHA), (OLD_SHA, OLD_SHA)):
                files = (self.server.old if sha == OLD_SHA else self.server.repositories).get(name)
                if files is None:
                    continue
                if path == f"/api/models/{name}/tree/{revision}":
                    return self._json([_entry(path, content) for path, content in files.items()])
                if path == f"/api/models/{name}/revision/{revision}" or (
                    path == f"/api/models/{name}" and revision == "main"
                ):
                    siblings = [_sibling(path, content) for path, content in files.items()]
                    info = {"_id": "1", "id": name, "sha": sha, "siblings": siblings, "private": False, "tags": []}
                    return self._json(info)
                prefix = f"/{name}/resolve/{revision}/"
                if path.startswith(prefix):
                    return self._file(path.removeprefix(prefix), files[path.removeprefix(prefix)], sha)
            if path.startswith(f"/api/models/{name}/"):
                return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, content: bytes, sha: str) -> None:
        hub = self.server
        headers = {"ETag": f'"{hash_of(name, content)}"', "X-Repo-Commit": sha}
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if self.command == "GET":
            hub.served.append(f"{name} {first}" if first else name)
        if hub.whole_only:
            first = 0
        if name in hub.damaged:
            content = bytes([content[0] ^ 1]) + content[1:]
        self._answer(206 if first else 200, content[first:], headers, drop=hub.drop_after, hold=hub.hold_after)

    def _answer(
        self, status: int, body: bytes, headers: Mapping[str, str], drop: int | None = None, hold: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "GET":
            return
        stop = len(body) if drop is None and hold is None else drop or hold
        self.wfile.write(body[:stop])
        if hold is not None:
            self.wfile.flush()
            self.server.release.wait(60)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def hash_of(name: str, content: bytes) -> str:
    """What the hub calls a file: SHA-256 where it is in LFS, git's SHA-1 otherwise."""
    if _in_lfs(name):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _in_lfs(name: str) -> bool:
    return name.endswith((".gguf", ".safetensors"))


def _git_hash(name: str, content: bytes) -> str:
    """Of a file in LFS git has only a pointer."""
    return hashlib.sha1(content).hexdigest() if _in_lfs(name) else hash_of(name, content)


def _entry(name: str, content: bytes) -> dict[str, object]:
    entry = {"type": "file", "path": name, "size": len(content), "oid": _git_hash(name, content)}
    lfs = {"lfs": {"oid": hash_of(name, content), "size": len(content), "pointerSize": 130}}
    return entry | (lfs if _in_lfs(name) else {})


def _sibling(name: str, content: bytes) -> dict[str, object]:
    entry = {"rfilename": name, "size": len(content), "blobId": _git_hash(name, content)}
    lfs = {"lfs": {"sha256": hash_of(name, content), "size": len(content), "pointerSize": 130}}
    return entry | (lfs if _in_lfs(name) else {})


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serves within the block."""
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.release.set()
        hub.shutdown()
        hub.server_close()


def environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """Environment of a client: no settings of this machine's user, and nobody's files but those in `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "LLM_INFER_CACHE": str(home / "own"), "NO_PROXY": "127.0.0.1"}
    return {**kept, "PYTHONPATH": str(ROOT), **own, **more}


_SCRIPT = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from llm_infer.commands import app
results = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["llm-infer", *arguments]
    code, out, err = 0, io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try: app.main()
        except SystemExit as stop: code = stop.code or 0
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


def commands(runs: Sequence[Sequence[str]], environ: Mapping[str, str]) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each `llm-infer ARGS`, one after the other in one process."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _SCRIPT, json.dumps(runs)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=dict(environ),
    )
    assert done.returncode == 0, done.stderr
    return [tuple(result) for result in json.loads(done.stdout)]
