"""`llm-infer pull | list | rm` against a hub on this machine: what arrives, what is interrupted, damaged or not there."""

from __future__ import annotations

import hashlib
import io
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_infer.base.errors import ModelError
from llm_infer.commands import app
from llm_infer.weights import local_models
from llm_infer.weights.default_model import DEFAULT_MODEL
from llm_infer.weights.local_models import LocalModel
from tests.weights.local_hub import OLD_SHA, SHA, Hub, commands, environment, serving

BIG = bytes(range(256)) * 4000


def test_models_are_pulled_listed_and_removed(tmp_path: Path) -> None:
    files = {
        "a-Q4_K_M.gguf": b"four" * 1000,
        "a-Q8_0.gguf": b"eight" * 2000,
        "big/a-F16-00001-of-00002.gguf": b"1" * 3000,
        "big/a-F16-00002-of-00002.gguf": b"2" * 3000,
        "README.md": b"not needed",
    }
    weights = {"config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors": b"w" * 700, "x.bin": b"pickle"}
    hub = Hub({"org/a": files, "org/w": weights}, old={"org/a": {"a-Q8_0.gguf": b"old" * 100}})
    home = tmp_path / "home"
    snapshot = home / "hub" / "models--org--a" / "snapshots" / SHA
    with serving(hub):
        pulled = commands(
            [
                *(["pull", "org/a"], ["pull", "org/a:f16"], ["pull", "org/a:q8_0", "--revision", "v1"]),
                *(["pull", "org/w"], ["pull", "org/a:Q4_K_M"], ["list"]),
                *(["pull", "org/a:Q5_0"], ["pull", "org/none"], ["pull", "org/a@v7"], ["pull", "nonsense"]),
                *(["rm", "org/a:Q4_K_M"], ["rm", "org/none"], ["rm", "./a"]),
            ],
            environment(hub.endpoint, home),
        )
    default, by_type, tagged, directory, again, listed, *refused = pulled
    assert default[:2] == (0, f"org/a:Q4_K_M: 1 file, 4.0 kB in {snapshot}/a-Q4_K_M.gguf\n")  # as llama.cpp
    assert by_type[:2] == (0, f"org/a:f16: 2 files, 6.0 kB in {snapshot}/big/a-F16-00001-of-00002.gguf\n")
    assert tagged[1].startswith("org/a@v1:q8_0: 1 file, 300 B in") and OLD_SHA in tagged[1]
    assert directory[1].startswith("org/w: 3 files, 704 B in") and again[:2] == default[:2]
    assert hub.served.count("a-Q4_K_M.gguf") == 1 and "a-Q8_0.gguf" in hub.served and "x.bin" not in hub.served
    rows = [line.split() for line in listed[1].splitlines()]
    assert [(row[0], " ".join(row[1:3])) for row in rows if row[0] != DEFAULT_MODEL.name] == [
        ("org/a:F16", "6.0 kB"),
        ("org/a:Q4_K_M", "4.0 kB"),
        ("org/a@v1:Q8_0", "300 B"),
        ("org/w", "704 B"),
        ("together", rows[-1][1] + " " + rows[-1][2]),
    ]
    expected = [
        "no GGUF file of type 'Q5_0': there are Q4_K_M (4.0 kB), F16 (6.0 kB), Q8_0 (10.0 kB)",
        "no local path 'org/none' and no such model on the Hugging Face hub",
        "has no revision 'v7'",
        "'nonsense' is no model of the hub: expected org/name, org/name:Q4_K_M",
        "nobody is at a terminal to answer: give -y",
        "model 'org/none' is not on this machine",
        "no model './a'",
    ]
    for (code, out, err), words in zip(refused, expected, strict=True):
        assert (code, out) == (1, "") and words in err and err.splitlines()[-1].startswith("error: ")

    # The hub is gone.
    runs = [
        *(["pull", "org/a:F16"], ["pull", "org/a:Q2_K"]),
        *(["rm", "-y", "org/a:F16"], ["rm", "-y", "org/a", "org/w"], ["list"]),
    ]
    f16, q2, one, both, listed = commands(runs, environment(hub.endpoint, home, LLM_INFER_OFFLINE="1"))
    assert f16[:2] == (0, by_type[1].replace("f16:", "F16:")) and "there are Q4_K_M (4.0 kB), F16 (6.0 kB)" in q2[2]
    assert one[:2] == (0, "removed org/a:F16: 6.0 kB\n")
    assert both[:2] == (0, "removed org/a:Q4_K_M, org/a@v1:Q8_0, org/w: 5.0 kB\n")
    assert "org/" not in listed[1]
    assert list((home / "hub").glob("models--*")) == []


def test_an_interrupted_pull_goes_on_where_it_stopped(tmp_path: Path) -> None:
    hub, home = Hub({"org/a": {"a-Q4_0.gguf": BIG}}), tmp_path / "home"
    pull = [sys.executable, "-m", "llm_infer.commands.app", "pull", "org/a"]
    blobs = home / "hub" / "models--org--a" / "blobs"
    with serving(hub):
        hub.hold_after = 400_000
        process = subprocess.Popen(pull, env=environment(hub.endpoint, home), stderr=subprocess.PIPE, text=True)
        while sum(path.stat().st_size for path in blobs.glob("*.incomplete")) < hub.hold_after:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1].splitlines()[-1] == "error: interrupted"
        assert process.returncode == 130
        hub.hold_after = None
        listed, pulled, after = commands([["list"], ["pull", "org/a"], ["list"]], environment(hub.endpoint, home))
    assert "org/a  " in listed[1] and "400.0 kB" in listed[1] and "not complete" in listed[1]
    assert pulled[0] == 0 and Path(pulled[1].split(" in ")[1].strip()).read_bytes() == BIG
    assert hub.served == ["a-Q4_0.gguf", "a-Q4_0.gguf 400000"]
    assert "org/a:Q4_0" in after[1] and "not complete" not in after[1] and not list(blobs.glob("*.incomplete"))


@pytest.mark.parametrize("whole_only", [False, True])
def test_a_connection_that_breaks_is_taken_up_again(tmp_path: Path, whole_only: bool) -> None:
    hub = Hub({"org/a": {"a-Q4_0.gguf": BIG, "a-Q8_0.gguf": BIG[1:]}})
    with serving(hub):
        hub.drop_after = None if whole_only else 300_000
        hub.damaged = {"a-Q8_0.gguf"}
        blob = tmp_path / "hub" / "models--org--a" / "blobs"
        if whole_only:  # a server that cannot begin in the middle begins anew
            hub.whole_only = True
            blob.mkdir(parents=True)
        for content in (BIG, BIG[1:]):
            if whole_only:
                (blob / f"{hashlib.sha256(content).hexdigest()}.incomplete").write_bytes(b"x" * 1000)
        good, bad = commands([["pull", "org/a:Q4_0"], ["pull", "org/a:Q8_0"]], environment(hub.endpoint, tmp_path))
    assert good[0] == 0 and Path(good[1].split(" in ")[1].strip()).read_bytes() == BIG
    rests = [f"a-Q4_0.gguf {at}" for at in ((1000,) if whole_only else (300_000, 600_000, 900_000))]
    assert [name for name in hub.served if "Q4" in name] == [*([] if whole_only else ["a-Q4_0.gguf"]), *rests]
    assert bad[0] == 1 and "a-Q8_0.gguf has SHA-256 " in bad[2] and "damaged and has been removed" in bad[2]
    assert not list(blob.glob("*.incomplete"))


@pytest.mark.parametrize(
    ("answer", "removed"), [("y\n", True), ("Yes\n", True), ("\n", False), ("no\n", False), ("", False)]
)
def test_rm_asks_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, answer: str, removed: bool
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"model")
    here = [LocalModel("org/a:Q4_0", 5, tmp_path, 0.0, files={file: file})]
    monkeypatch.setattr(local_models, "local_models", lambda: [one for one in here if file.exists()])
    stdin = io.StringIO(answer)
    monkeypatch.setattr(stdin, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", stdin)
    monkeypatch.setattr(sys, "argv", ["llm-infer", "rm", "org/a:q4_0"])
    with pytest.raises(SystemExit) as stop:
        app.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and file.exists() != removed
    assert out == ("removed org/a:Q4_0: 5 B\n" if removed else "")
    assert err.startswith(f"org/a:Q4_0  5 B  {tmp_path}\nRemove it? [y/N] ")
    assert err.endswith("nothing is removed\n") != removed


def test_a_model_that_came_with_a_package_is_left_to_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLM_INFER_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "site" / "m.gguf"
    file.parent.mkdir()
    file.touch()
    with pytest.raises(
        ModelError, match=f"belongs to an installed package: run `pip uninstall {DEFAULT_MODEL.distribution}`"
    ):
        local_models.remove([LocalModel(DEFAULT_MODEL.name, 0, file.parent, 0.0, files={file: file})])
    assert file.exists()


def test_rm_leaves_what_others_have_in_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Other formats, other snapshots that show the same content, and what is just being fetched."""
    repository = tmp_path / "models--org--a"
    content = {"q4": ("1", "2"), "q8": ("1",), "config": ("1", "2"), "onnx": ("2",), "arriving": ()}
    names = {"q4": "m-Q4_0.gguf", "q8": "m-Q8_0.gguf", "config": "config.json", "onnx": "model.onnx"}
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1")
    for blob, snapshots in content.items():
        (repository / "blobs" / blob).write_text(blob)
        for snapshot in snapshots:
            path = repository / "snapshots" / snapshot / names[blob]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(f"../../blobs/{blob}")

    def here(*shown: str) -> None:
        found = {path.name for path in (*repository.glob("blobs/*"), *repository.glob("refs/*"))}
        assert found == set(shown)

    def model(snapshot: str, name: str, blob: str) -> LocalModel:
        files = {repository / "snapshots" / snapshot / name: repository / "blobs" / blob}
        return LocalModel("org/a", 0, repository, 0.0, files=files)

    monkeypatch.setenv("LLM_INFER_CACHE", str(tmp_path / "own"))
    local_models.remove([model("1", "m-Q8_0.gguf", "q8")])
    here("q4", "config", "onnx", "arriving", "main")
    local_models.remove([model("1", "m-Q4_0.gguf", "q4")])  # the last weights of this snapshot
    here("q4", "config", "onnx", "arriving")
    assert [path.name for path in repository.glob("snapshots/*")] == ["2"]
    local_models.remove([model("2", "m-Q4_0.gguf", "q4")])
    here("config", "onnx", "arriving")
    (repository / "blobs" / "arriving").unlink()
    (repository / "snapshots" / "2" / "model.onnx").rename(repository / "snapshots" / "2" / "m-Q4_1.gguf")
    local_models.remove([model("2", "m-Q4_1.gguf", "onnx")])
    assert not repository.exists()
