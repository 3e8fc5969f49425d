"""`bench peers` with small programs in place of engines: one that fails, hangs or lacks a figure costs that alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_infer.base.errors import UserError
from llm_infer.bench import peers
from llm_infer.bench.peer_process import Figure, figures
from llm_infer.bench.peer_programs.reporting import report_all
from llm_infer.bench.peer_table import Row, table

FAKE = """
import json, os, sys, time
def say(metric, value, **more):
    print(json.dumps({"metric": metric, "value": value, "version": "1", "precision": "some", **more}), flush=True)
print("a line of a log")
for metric in ("prefill_512", "decode_b1", "decode_b8", "decode_b32"):
    if metric == "decode_b8":
        HERE
    say(metric, 2.0)
for depth in filter(None, sys.argv[1].split(",")):
    say("decode_b1_d" + depth, 1.0 + int(depth))
"""
Engines = Callable[..., None]


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engines:
    """Puts programs in the place of engines: ours are good ones, and `bad` stands for the first that is asked for."""

    def install(fault: str, ours: str = "pass") -> None:
        (tmp_path / "model.gguf").touch()
        for name, line in (("good", ours), ("bad", fault)):
            (tmp_path / f"{name}.py").write_text(FAKE.replace("HERE", line))

        def commands(_: object, pythons: dict[str, str | None], __: int, depths: list[int]) -> dict[str, list[str]]:
            end = ",".join(map(str, depths))
            found = {name: [sys.executable, "-S", str(tmp_path / "good.py"), end] for name in peers.OURS}
            given = {name: python for name, python in pythons.items() if python is not None}
            return found | {
                name: [python, "-S", str(tmp_path / f"{file}.py"), end]
                for (name, python), file in zip(given.items(), ("bad", "good"), strict=False)
            }

        monkeypatch.setattr(peers, "_commands", commands)

    return install


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("raise SystemExit('the model does not load')", "exit code 1: the model does not load"),
        ("os.kill(os.getpid(), 9)", "exit code -9 (SIGKILL)"),
        ("break", "it gave no decode_b8, decode_b32"),
        ("say(metric, None)", "no figure"),
        ("say(metric, float('inf'))", "no figure"),
        ("""print('{"metric": "decode')""", "no figure"),
    ],
)
def test_a_peer_that_fails_costs_its_row_alone(
    fault: str, why: str, engines: Engines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines(fault)
    pythons = {"llama.cpp": sys.executable, "transformers": "/missing/python", "openvino": None}
    peers.run(str(tmp_path / "model.gguf"), pythons, 2, 1, str(tmp_path / "out.json"))
    out, record = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert record["tok_s"]["ours exact"] == record["tok_s"]["ours fast"] == {m: [2.0, 2.0] for m in peers.METRICS}
    assert record["tok_s"]["llama.cpp"]["decode_b1"] == [2.0], "what it gave is kept"
    assert why in record["errors"]["llama.cpp"] and "cannot be run" in record["errors"]["transformers"]
    assert out.count("round 1, ") == 4 and out.count("round 2, ") == 2 and "1.00 ×" in out
    assert len([line for line in out.split("ratios of them:")[1].splitlines() if why in line]) == 1


def test_a_figure_that_an_engine_lacks_is_a_dash_and_it_stays_in_the_rounds(
    engines: Engines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines("say(metric, None, why='its batch is 4'); continue")
    python = {"llama.cpp": sys.executable, "openvino": sys.executable}
    peers.run(str(tmp_path / "model.gguf"), python, 2, 1, str(tmp_path / "out.json"), "0,2048,2048")
    out, record = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert record["tok_s"]["llama.cpp"]["decode_b32"] == [2.0, 2.0] and record["tok_s"]["llama.cpp"]["decode_b8"] == []
    assert record["missing"] == {"llama.cpp": {"decode_b8": "its batch is 4"}} and record["errors"] == {}
    assert record["tok_s"]["openvino"]["decode_b1_d2048"] == [2049.0] * 2
    assert record["versions"]["ours exact"] == "1" and record["precisions"]["openvino"] == "some"
    starts = [line.split(":")[0] for line in out.splitlines() if line.startswith("round")]
    names = ("ours exact", "ours fast", "llama.cpp", "openvino")
    assert starts == [f"round {number}, {name}" for number in (1, 2) for name in names], "in turn"
    lines = out.split("ratios of them:")[1].splitlines()
    assert next(line for line in lines if line.startswith("engine")).split()[1:] == [
        *peers.METRICS,
        *("decode_b1_d0", "decode_b1_d2048"),
    ]
    assert next(line for line in lines if line.startswith("llama.cpp 1")).split()[2:6] == ["2.0", "±", "0.0", "–"]
    assert "llama.cpp: no decode_b8: its batch is 4" in lines


def test_an_engine_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    program = f"""
import json, subprocess, sys, time
print(json.dumps({{"metric": "decode_b1", "value": 2.0}}), flush=True)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
open({str(child)!r}, "w").write(str(child.pid))
while True:
    print("still here", flush=True)
    time.sleep(0.05)
"""
    started, seen = time.monotonic(), []
    with pytest.raises(UserError, match=r"no figure within 2\.5 s: --limit"):
        seen.extend(figures([sys.executable, "-S", "-c", program], 2.5))
        pytest.fail("it ended")
    assert 2.5 <= time.monotonic() - started < 30
    state = Path(f"/proc/{child.read_text()}/stat")
    deadline = time.monotonic() + 10
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_figures_come_while_the_program_runs(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    program = f"""
import os, time
print('{{"metric": "a", "value": 1}}', flush=True)
while not os.path.exists({str(gate)!r}):
    time.sleep(0.01)
print('{{"metric": "b", "value": 2, "version": "3"}}', flush=True)
"""
    found = figures([sys.executable, "-S", "-c", program], 30)
    assert next(found) == Figure("a", 1.0)
    gate.touch()
    assert list(found) == [Figure("b", 2.0, version="3")]


def test_the_file_grows_after_each_figure(
    engines: Engines, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines("pass")
    file, found, shown = tmp_path / "out.json", [], []

    def watched(*arguments: object) -> object:
        for figure in figures(*arguments):  # type: ignore[arg-type]
            yield figure
            found.append(sum(len(v) for by in json.loads(file.read_text())["tok_s"].values() for v in by.values()))
            shown.append(capsys.readouterr().out)

    monkeypatch.setattr(peers, "figures", watched)
    peers.run(str(tmp_path / "model.gguf"), {"llama.cpp": sys.executable}, 1, 1, str(file))
    assert found == list(range(1, 13))
    assert shown[:2] == ["round 1, ours exact: prefill_512 2.0,", " decode_b1 2.0,"]


def test_no_engine_at_all_is_an_error(engines: Engines, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engines("pass", ours="pass")
    (tmp_path / "good.py").write_text("raise SystemExit('broken')")
    with pytest.raises(UserError, match="no engine could be measured"):
        peers.run(str(tmp_path / "model.gguf"), {}, 2, 1, None)
    assert capsys.readouterr().out.count("exit code 1: broken") == 4, "when it happens, and below the table"


@pytest.mark.parametrize("depths", ["a", "-1", "1,,2"])
def test_depths_that_are_no_numbers(depths: str) -> None:
    with pytest.raises(UserError, match="--depth"):
        peers.run("missing.gguf", {}, 1, 1, None, depths)


def test_a_directory_is_for_those_that_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = peers.ModelSource("m", "huggingface", tmp_path)
    pythons = {"llama.cpp": "a", "transformers": "b", "openvino": None}
    commands = peers._commands(source, pythons, 3, [0, 2048])
    assert list(commands) == ["ours exact", "ours fast", "llama.cpp", "transformers"]
    assert commands["ours fast"][-4:] == [str(tmp_path), "3", "0,2048", "fast"]
    assert commands["transformers"][0] == "b" and commands["transformers"][-3:] == [str(tmp_path), "3", "0,2048"]
    unread = [name for name in commands if peers._unreadable(source, name)]
    assert unread == ["llama.cpp"] and "GGUF" in str(peers._unreadable(source, "llama.cpp"))


def test_every_peer_has_its_program() -> None:
    folder = Path(peers.__file__).parent / "peer_programs"
    assert all((folder / f"{program}.py").is_file() for program in peers.PROGRAMS.values())


def test_the_neighbours_of_the_programs_need_no_package(tmp_path: Path) -> None:
    folder = Path(peers.__file__).parent / "peer_programs"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    call = "from reporting import numbers; print(numbers('0,2048'), numbers(''))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", call], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[0, 2048] []\n"


def test_a_measurement_that_raises_costs_its_figure_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def decode(size: int, length: int) -> float:
        if length > 1000:
            raise ValueError("its context is 1000\nand more lines")
        return 100.0 * size + length

    report_all("1.2", "some", lambda length: float(length), decode, [0, 2048])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {line["metric"]: line["value"] for line in lines}
    sizes = {f"decode_b{size}": 100.0 * size + 128 for size in (1, 8, 32)}
    assert found == {"prefill_512": 512.0, **sizes, "decode_b1_d0": 101.0, "decode_b1_d2048": None}
    assert lines[-1]["why"] == "its context is 1000" and {line["version"] for line in lines} == {"1.2"}


def test_peers_are_compared_by_medians() -> None:
    rows = {
        "ours exact": Row({m: [1.0, 2.0, 9.0] for m in peers.METRICS}),
        "ours fast": Row({m: [4.0] for m in peers.METRICS}),
        "peer": Row({m: [0.5] for m in peers.METRICS}, "1.2"),
    }
    text = table(rows, peers.METRICS, list(peers.OURS))
    assert "2.0 ± 4.0" in text and "4.00 ×" in text and "8.00 ×" in text and "peer 1.2" in text


def test_ours_may_lack_what_a_peer_has() -> None:
    rows = {
        "ours exact": Row({"decode_b1": [1.0]}),
        "ours fast": Row(error="it broke"),
        "peer": Row({"decode_b1": [2.0], "decode_b8": [3.0]}),
    }
    text = table(rows, peers.METRICS, list(peers.OURS))
    assert "0.50 ×" in text and "ours fast: it broke" in text
