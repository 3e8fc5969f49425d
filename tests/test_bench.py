"""The arithmetic of the benchmarks, and what they say of input that cannot be measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm_infer.base.errors import UserError
from llm_infer.bench import context, decoding, memory, offline, step
from llm_infer.bench.compiled import kernels
from llm_infer.options import EngineOptions


def test_growth_is_a_multiple_of_the_time_to_read_what_was_added() -> None:
    report = context.growth({128: 0.010, 2048: 0.014}, token_bytes=1000, bandwidth=1.92e9)
    first, last = report["contexts"]
    assert first["ratio"] is None and first["added_bytes"] == 0
    assert last["added_bytes"] == 1_920_000 and last["ratio"] == pytest.approx(4.0)
    text = context.table(report)
    assert "14.00" in text and "4.00" in text and "1.9 GB/s" in text


@pytest.mark.parametrize("contexts", ["", "a,b", "0,128"])
def test_contexts_that_are_no_lengths(contexts: str) -> None:
    with pytest.raises(UserError, match="--contexts"):
        context.run("missing.gguf", contexts, 8, 1, "exact", None)


def test_copying_memory_takes_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "COPIED_BYTES", 1 << 22)
    assert 1e8 < context.copy_bandwidth(1) < 1e13


def test_a_failed_measurement_of_memory_gives_its_reason() -> None:
    with pytest.raises(UserError, match=r"missing\.gguf"):
        memory.run("missing.gguf", 1 << 20, "exact", None)


@pytest.mark.real
@pytest.mark.sweep
def test_memory_at_batch_1(default_gguf, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights, pool and 120 MB for all else; the figure of a warm start is in docs/performance.md."""
    memory.run(str(default_gguf), 64_000_000, "exact", None)
    out = capsys.readouterr().out
    print(out)
    more = float(out.split(": ")[1].split(" MB more")[0])
    assert 160 < more < 300


def test_rows_of_kernels_come_one_by_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def record(_: object) -> Iterator[dict]:
        yield {"kernel": "first", "cycles": 1}
        assert "kernel first, cycles 1" in capsys.readouterr().out
        yield {"kernel": "second", "spills": None}

    monkeypatch.setattr(kernels, "why_not", lambda _: None)
    monkeypatch.setattr(kernels.importlib, "import_module", lambda _: SimpleNamespace(record=record))
    kernels.run("v5e")
    assert "kernel second, spills –" in capsys.readouterr().out


def test_rows_of_offline_come_one_by_one_and_a_missing_value_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = (
        "prefill_tok_s",
        "ttft_s",
        "page_occupancy",
        *(f"{n}_ms_per_step" for n in ("schedule", "prepare", "dispatch", "device", "commit")),
    )
    shown: list[str] = []

    def measure(*_: object) -> dict:
        shown.append(capsys.readouterr().out)
        return {**dict.fromkeys(keys, 1.0), "decode_tok_s": None if len(shown) == 2 else 5.0, "tpot_s": None}

    times = SimpleNamespace(compiles_after_warmup=0)
    engine = SimpleNamespace(runner=SimpleNamespace(times=times))
    llm = SimpleNamespace(engine=engine, warm_up=lambda: None)
    monkeypatch.setattr(offline, "LLM", SimpleNamespace(of=lambda _: llm))
    monkeypatch.setattr(offline, "measure", measure)
    offline.run("1", 4, 4, 8, 2, str(tmp_path / "out.json"), EngineOptions("m"))
    assert "prefill_8" in shown[1] and "decode_b1" in shown[2] and "medians of 2 rounds" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["runs"]["decode_b1"]["decode_tok_s"] == 5.0


def test_a_step_is_shared_out_by_what_its_instructions_call() -> None:
    hlo = """
      %while.1 = (s32[], f32[2]) while(%t), condition=%c, body=%b
      %p1 = u8[30,8,20]{2,1,0} parameter(1)
      ROOT %call.9 = (f32[2]{0}, s8[4]) custom-call(%p0, %p1), custom_call_target="llm_infer.quant_matmul_q4_1", api_version=4
      %fusion.3 = f32[2]{0} fusion(%p0), kind=kLoop, calls=%f
    """
    parts = step.parts_of(hlo)
    assert parts == {"p1": step.REST, "call.9": "quant_matmul_q4_1", "fusion.3": step.REST}
    events = {"call.9": [2.0, 2.0, 9.0] * step.NEW_TOKENS, "fusion.3": [0.5], "while.1": [100.0], "unknown": [1.0]}
    found = step.spent(parts, events)
    assert found == {"quant_matmul_q4_1": 6.0, step.REST: 0.5}
    read = step.bytes_read(hlo, parts, events)
    assert read == {"quant_matmul_q4_1": 3 * 8 * 20}  # a layer's matrix in each of a step's calls
    text = step.table(10.0, found, {"dispatch": 0.25}, {"quant_matmul_q4_1": 12.0}, 48.0)
    assert "12.0 GB/s of weights, 25% of what memory gives" in text and "reading memory, this run: 48.0 GB/s" in text
    assert "60.0%" in text and "4.000 ms   40.0%" in text and "dispatch 0.250 ms" in text


@pytest.mark.real
@pytest.mark.sweep
def test_a_profiled_step_names_its_kernels(default_gguf, capsys: pytest.CaptureFixture[str]) -> None:
    step.run(str(default_gguf), 1, "exact", None)
    out = capsys.readouterr().out
    print(out)
    assert "quant_matmul" in out and "paged_attention" in out


def test_questions_in_the_format_of_spec_bench(tmp_path) -> None:
    lines = [
        '{"question_id": 1, "category": "summarization", "turns": ["Summarize: One. Two. Three. Four. Five. Six."]}',
        '{"question_id": 2, "category": "writing", "turns": ["Write a poem.", "Again."]}',
        '{"question_id": 3, "category": "translation", "turns": ["Translate this."]}',
    ]
    (file := tmp_path / "questions.jsonl").write_text("\n".join(lines))
    found = decoding._questions(str(file))
    assert found["summarise"] == ["Summarize: One. Two. Three. Four. Five. Six."] and found["free"] == ["Write a poem."]
    assert found["edit"] == [f"{decoding.EDITS[0]}:\n\nOne. Two. Three. Four."]
    file.write_text('{"question_id": 1}')
    with pytest.raises(UserError, match="--spec-bench"):
        decoding._questions(str(file))
    assert "   1.50 ×   (goal ≤ 2; 1.00 … 3.00)" in str(decoding._figure("time", [3.0, 1.5, 1.0], "×", "≤ 2"))
