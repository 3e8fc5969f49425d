"""The commands `llm-infer bench …`: each hands its options to a module of `bench/`, which is imported only then."""

from __future__ import annotations

from typing import Annotated

import typer

from llm_infer.commands.bench_serving import serving
from llm_infer.commands.command import Commands
from llm_infer.commands.completion import complete_model
from llm_infer.commands.options import (
    Debug,
    JsonFile,
    Model,
    PageDtype,
    Precision,
    existing_model,
    takes_engine_options,
)
from llm_infer.options import DEFAULT_MODEL_NAME, EngineOptions

bench = Commands(help="Measures speed and memory; every figure names its unit.", no_args_is_help=True)
bench.command()(serving)


@bench.command()
@takes_engine_options(
    *("num_scheduler_steps", "load_format", "device", "dtype", "precision", "memory_utilization"),
    *("tensor_parallel_size", "data_parallel_size", "expert_parallel_size"),
)
def offline(
    batch: Annotated[str, typer.Option(help="Batch sizes, comma separated.")] = "1,8,32",
    prompt_tokens: Annotated[int, typer.Option(help="Prompt length of the decode runs.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="New tokens of each sequence.")] = 64,
    prefill_tokens: Annotated[int, typer.Option(help="Prompt length of the prefill run.")] = 512,
    rounds: Annotated[int, typer.Option(help="Repetitions; medians are reported.")] = 3,
    json_file: JsonFile = None,
    *,
    options: EngineOptions,
) -> None:
    """Measures throughput and latencies of prefill and decoding.

    Also where the time of a step goes, and how full the pages are.
    """
    from llm_infer.bench.offline import run

    run(batch, prompt_tokens, new_tokens, prefill_tokens, rounds, json_file, options)


@bench.command()
def context(
    model: Model = DEFAULT_MODEL_NAME,
    contexts: Annotated[str, typer.Option(help="Context lengths, comma separated.")] = "128,512,1024,2048",
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after each context.", min=8)] = 32,
    rounds: Annotated[int, typer.Option(help="Repetitions; the smallest time counts.")] = 3,
    json_file: JsonFile = None,
    precision: Precision = "exact",
    kv_cache_dtype: PageDtype = "auto",
    debug: Debug = False,
) -> None:
    """Measures the time per token by context length, at batch 1.

    The time that reading the keys and values takes stands beside it.
    """
    from llm_infer.bench.context import run

    run(model, contexts, new_tokens, rounds, precision, json_file, kv_cache_dtype)


@bench.command()
def memory(
    model: Model = DEFAULT_MODEL_NAME,
    pool: Annotated[int, typer.Option(help="Page pool in MB.", min=1)] = 64,
    json_file: JsonFile = None,
    precision: Precision = "exact",
    debug: Debug = False,
) -> None:
    """Measures the memory of decoding at batch 1.

    That of importing the packages is not counted.
    """
    from llm_infer.bench.memory import run

    run(model, pool * 1_000_000, precision, json_file)


@bench.command()
def step(
    model: Model = DEFAULT_MODEL_NAME,
    batch: Annotated[int, typer.Option(help="Sequences that decode together.", min=1)] = 1,
    json_file: JsonFile = None,
    precision: Precision = "exact",
    debug: Debug = False,
) -> None:
    """Measures where the time of a decode step goes.

    Shows each native kernel, the rest of the program, and the host.
    """
    from llm_infer.bench.step import run

    run(model, batch, precision, json_file)


@bench.command()
def decoding(
    model: Model = DEFAULT_MODEL_NAME,
    spec_bench: Annotated[str | None, typer.Option(help="Questions in the format of Spec-Bench (JSON lines).")] = None,
    rounds: Annotated[int, typer.Option(help="Repetitions; medians are reported.", min=1)] = 5,
    json_file: JsonFile = None,
    precision: Precision = "exact",
    debug: Debug = False,
) -> None:
    """Measures what ways to decode cost and save.

    These are beam search, speculation, sampling parameters and structured output.
    """
    from llm_infer.bench.decoding import run

    run(model, spec_bench, rounds, json_file, precision)


@bench.command()
def startup(
    model: Model = DEFAULT_MODEL_NAME,
    rounds: Annotated[int, typer.Option(help="Warm starts; the median is reported.")] = 3,
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Measures the time from the start to the first token.

    It runs `llm-infer generate` with empty caches (cold) and with filled ones (warm).
    """
    from llm_infer.bench.startup import run

    run(model, rounds, json_file)


@bench.command()
def peers(
    model: Model = DEFAULT_MODEL_NAME,
    llama_cpp: Annotated[str | None, typer.Option(help="A Python that has llama-cpp-python.")] = None,
    ik_llama_cpp: Annotated[str | None, typer.Option(help="A Python that has ik-llama-cpp-python.")] = None,
    openvino: Annotated[str | None, typer.Option(help="A Python that has openvino-genai.")] = None,
    transformers: Annotated[
        str | None, typer.Option(help="A Python that has transformers, torch, gguf and accelerate.")
    ] = None,
    mistralrs: Annotated[str | None, typer.Option(help="A Python that has mistralrs.")] = None,
    depth: Annotated[
        str, typer.Option(help="Also decode after so many tokens, comma separated, such as 0,2048,8192.")
    ] = "",
    rounds: Annotated[int, typer.Option(help="Rounds through all engines; medians are reported.", min=1)] = 3,
    threads: Annotated[int | None, typer.Option(help="Threads of each engine; default: all cores.", min=1)] = None,
    limit: Annotated[
        float, typer.Option(help="Seconds that an engine may take for a figure, then it is left out.", min=1)
    ] = 1200,
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Compares throughput with other engines on this machine.

    All of them run the same model, in turn; one that fails costs its own row alone. The file of `--json` grows
    after each figure.
    """
    from llm_infer.bench.peers import run

    pythons = {
        "llama.cpp": llama_cpp,
        "ik_llama.cpp": ik_llama_cpp,
        "openvino": openvino,
        "transformers": transformers,
        "mistral.rs": mistralrs,
    }
    run(model, pythons, rounds, threads, json_file, depth, limit)


@bench.command()
def quality(
    model: Model = DEFAULT_MODEL_NAME,
    reference: Annotated[
        str | None,
        typer.Option(
            help="A model with the same tokens to compare with, such as the file it was quantised from.",
            callback=lambda name: None if name is None else existing_model(name),
            metavar="NAME",
            autocompletion=complete_model,
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="A text file; default: prose that comes with Python.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to compare.", min=2)] = 4096,
    kv_cache_dtype: PageDtype = "auto",
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Measures what `--precision fast` changes on a text.

    Shows how often the most likely token is the same, the KL divergence, and perplexities. With `--reference`, both
    precisions are compared with that model in `exact`: what a type of blocks costs, and what `fast` adds. With
    `--kv-cache-dtype`, both are compared with float32 pages.
    """
    from llm_infer.bench.quality import run

    run(model, reference, text, tokens, json_file, kv_cache_dtype)


@bench.command("kernels")
def bench_kernels(
    target: Annotated[str, typer.Option(help="Chip to compile for: v5e, v6e, v5p, tpu7x or sm_90.")],
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Shows what the compiler for a chip says of each kernel.

    These are estimated cycles, bytes and spills. Needs no such chip.
    """
    from llm_infer.bench.compiled.kernels import run

    run(target, json_file)


@bench.command()
def aot(
    models: Annotated[str, typer.Option(help="Architectures, comma separated; default: five.")] = "",
    slices: Annotated[str, typer.Option(help="Slices such as v6e:2x4, comma separated; default: five.")] = "",
    tokens: Annotated[str, typer.Option(help="Steps: 2048 (prefill), 64 (decode); default: both.")] = "",
    write: Annotated[str | None, typer.Option(help="Markdown file whose table, between marks, gets the rows.")] = None,
    limit: Annotated[
        int, typer.Option(help="Seconds of CPU time for a program, then it is given up; 0: no limit.")
    ] = 0,
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Compiles steps for TPU slices and a GPU.

    They need not be here. Shows memory, collectives and the time of prefill and decode steps.
    """
    from llm_infer.bench.compiled.steps import run

    run(models, slices, tokens, write, json_file, limit)


@bench.command()
def host(
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Measures what the host spends on a decode step.

    The step has 64 or 256 sequences, and its device takes no time.
    """
    from llm_infer.bench.host import run

    run((64, 256), json_file)


@bench.command()
def cache(debug: Debug = False) -> None:
    """Compares the memory of paged and contiguous allocation.

    It simulates the allocator alone.
    """
    from llm_infer.bench.simulate import table

    print(table())
