"""`llm-infer bench aot`: the engine's real step compiled for chips that are not here, as a table for docs/performance.md."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_infer.base.errors import UserError
from llm_infer.config import ParallelConfig
from llm_infer.models.architectures import architecture_config, architecture_names
from llm_infer.models.config import ModelConfig
from pallas_kernels.targets import TARGETS, environment, why_not

MODELS = ("llama-3.1-8b", "llama-3.1-70b", "qwen3-8b", "qwen3-30b-a3b", "opt-13b")
SLICES = ("v5e:2x4", "v6e:2x4", "v5p:2x2x2", "tpu7x:2x2x1", "sm_90")
PREFILL_TOKENS, DECODE_SEQUENCES = 2048, 64
BEGIN, END = "<!-- bench aot: begin -->", "<!-- bench aot: end -->"
HEAD = (
    "| slice | model | step | GB per device | ÷ closed form | temporaries MB | pages | in place ÷ pool | all-reduces per layer "
    "| other collectives | largest copy MB | compiler's Mcycles | compile CPU s |",
    "|" + 13 * "---|",
)
REFUSED = "Not compiled:"


@dataclass(frozen=True, slots=True)
class Job:
    """One program: an architecture, maybe with fewer layers, on a slice, for a number of tokens."""

    model: str
    slice: str
    tokens: int
    layers: int | None = None
    num_pages: int | None = None

    @property
    def chip(self) -> str:
        """The name of the target."""
        return self.slice.partition(":")[0]

    def config(self) -> ModelConfig:
        """Returns the architecture's configuration."""
        config = architecture_config(self.model)
        return config if self.layers is None else config.with_layers(self.layers)

    def parallel(self) -> ParallelConfig:
        """Returns the sizes for all eight devices of a slice, experts whole and all else cut by tensor parallelism; a GPU is
        alone."""
        if ":" not in self.slice:
            return ParallelConfig()
        return ParallelConfig(tensor_parallel_size=8) if self.config().moe is None else ParallelConfig(1, 1, 8)


def run(models: str, slices: str, tokens: str, write: str | None, json_file: str | None, limit: int) -> None:
    """Compiles steps of `tokens` tokens of every model for every slice, and prints a table.

    The table in `write` gets each program's row as soon as it is there; rows of other programs stay.
    """
    steps = [int(each) for each in _chosen(tokens, (str(PREFILL_TOKENS), str(DECODE_SEQUENCES)), "--tokens")]
    jobs = [
        Job(model, each, num_tokens)
        for each in _chosen(slices, SLICES, "--slices")
        for model in _chosen(models, MODELS, "--models", architecture_names())
        for num_tokens in steps
    ]
    if write:
        put_between_markers(Path(write), "")
    results = []
    for result in compile_all(jobs, limit):
        results.append(result)
        print(json.dumps(result), file=sys.stderr, flush=True)
        if write:
            put_between_markers(Path(write), table([result]))
    print(table(results))
    if json_file:
        Path(json_file).write_text(json.dumps(results, indent=2) + "\n")


def compile_all(jobs: list[Job], limit: int = 0) -> Iterator[dict[str, Any]]:
    """Yields the jobs' results as they come: fields of the job and of `planner.aot.Compiled`, or `refused` with the reason.

    The jobs for one kind of chip share a process, started with what its compiler needs, and started anew after a program that
    took longer than `limit` seconds of CPU time (0: no limit).
    """
    for name in dict.fromkeys(job.chip for job in jobs):
        target = TARGETS[name]
        if (reason := why_not(target)) is not None:
            raise UserError(f"cannot compile for {name}: {reason}")
        waiting = [asdict(job) for job in jobs if job.chip == name]
        # Nothing that this process has been told about devices may reach the compiler.
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "JAX_PLATFORMS"))}
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        while waiting:
            command = [sys.executable, "-m", "llm_infer.bench.compiled.steps", str(limit), json.dumps(waiting)]
            with tempfile.TemporaryFile("w+") as said:  # compilers print much, and a pipe that nobody reads fills up
                with subprocess.Popen(
                    command,
                    env={**inherited, **environment(target), **paths},
                    stdout=subprocess.PIPE,
                    stderr=said,
                    text=True,
                ) as process:
                    assert process.stdout is not None
                    for line in process.stdout:
                        if line.startswith("{"):
                            waiting.pop(0)
                            yield json.loads(line)
                if process.returncode == -signal.SIGXCPU:
                    yield {**waiting.pop(0), "refused": f"given up after {limit} s of CPU time"}
                elif process.returncode:
                    said.seek(0)
                    raise RuntimeError(f"compiling for {name} failed: {said.read()[-3000:]}")


def limit_cpu_time(seconds: int) -> None:
    """Has the system end this process, by SIGXCPU, once it has used this much more time (0: never)."""
    used, most = resource.getrusage(resource.RUSAGE_SELF), resource.getrlimit(resource.RLIMIT_CPU)[1]
    end = int(used.ru_utime + used.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    resource.setrlimit(resource.RLIMIT_CPU, (end if seconds else most, most))


def compile_one(job: Job) -> dict[str, Any]:
    """Returns the result of one job, in a process whose environment is that of its slice."""
    from llm_infer.planner.aot import compile_step

    topology = job.slice.partition(":")[2]
    config = job.config()
    try:
        found = compile_step(
            config,
            TARGETS[job.chip],
            topology=topology or None,
            parallel=job.parallel(),
            tokens=job.tokens,
            max_num_seqs=DECODE_SEQUENCES,
            max_model_len=min(8192, config.max_position_embeddings),
            num_pages=job.num_pages,
        )
    except UserError as error:
        return {**asdict(job), "refused": str(error)}
    return {**asdict(job), **asdict(found), "estimated_bytes": found.estimated.total}


def table(results: list[dict[str, Any]]) -> str:
    """Returns a Markdown table with a row for each program, and a line for each that was not compiled."""
    rows, refusals = [], []
    for r in results:
        step = "decode 64" if r["tokens"] == DECODE_SEQUENCES else f"prefill {r['tokens']}"
        if "refused" in r:
            refusals.append(f"- {r['slice']}, {r['model']}, {step}: {r['refused']}")
            continue
        layers = r["layers"] or architecture_config(r["model"]).num_layers
        reduces = r["collectives"].get("all-reduce", 0)
        # One more sums the tokens' embedding, whose table is cut over the vocabulary.
        per_layer = "–" if not reduces else f"{(reduces - 1) / layers:g}"
        others = ", ".join(f"{n} {kind}" for kind, n in r["collectives"].items() if kind != "all-reduce") or "–"
        cycles = "–" if r["megacycles"] is None else f"{r['megacycles']:.1f}"
        rows.append(
            f"| {r['slice']} | {r['model']} | {step} | {r['total_bytes'] / 1e9:.2f} | "
            f"{r['total_bytes'] / r['estimated_bytes']:.3f} | {r['temporary_bytes'] / 1e6:.0f} | {r['num_pages']} | "
            f"{r['aliased_bytes'] / r['estimated']['pages']:.3f} | {per_layer} | {others} | "
            f"{r['largest_copy'] / 1e6:.1f} | {cycles} | {r['compile_cpu_seconds']:.0f} |"
        )
    return _table(rows, refusals)


def merged(old: str, new: str) -> str:
    """Merges two tables, sorted by slice, step and model; for a program in both, the new row counts."""
    rows: dict[tuple[str, ...], str] = {}
    for line in f"{old}\n{new}".splitlines():
        if found := re.match(r"\| (\S+) \| (\S+) \| (\w+ \d+) \||- (\S+), (\S+), (\w+ \d+): ", line):
            rows[tuple(filter(None, found.groups()))] = line
    models = (*MODELS, *(name for name in architecture_names() if name not in MODELS))
    order = sorted(rows, key=lambda key: (SLICES.index(key[0]), key[2], models.index(key[1])))
    return _table(
        [rows[key] for key in order if rows[key][0] == "|"], [rows[key] for key in order if rows[key][0] == "-"]
    )


def put_between_markers(path: Path, text: str) -> None:
    """Merges a table into the one between the markers of a Markdown file.

    Raises:
        UserError: the file has no such markers.
    """
    old = path.read_text() if path.is_file() else ""
    if BEGIN not in old or END not in old:
        raise UserError(f"--write {path}: expected a file with the lines {BEGIN} and {END}")
    before, rest = old.split(BEGIN)
    between, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}\n{merged(between, text)}\n{END}{after}")


def _table(rows: list[str], refusals: list[str]) -> str:
    return "\n".join([*HEAD, *rows] + (["", REFUSED, "", *refusals] if refusals else []))


def _chosen(text: str, usual: Sequence[str], flag: str, known: Sequence[str] | None = None) -> list[str]:
    """Reads a list of names among `known`; the usual ones where none are given."""
    known, chosen = known or usual, [part.strip() for part in text.split(",")] if text else list(usual)
    if unknown := [name for name in chosen if name not in known]:
        raise UserError(f"{flag} {unknown[0]!r}: expected some of {','.join(known)}")
    return chosen


if __name__ == "__main__":
    for description in json.loads(sys.argv[2]):
        limit_cpu_time(int(sys.argv[1]))
        print(json.dumps(compile_one(Job(**description))), flush=True)
