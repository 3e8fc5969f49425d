"""The command line: `llm-infer generate | chat | convert | models | bench | doctor`. Answers go to stdout, the rest to stderr."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_infer import accelerators
from llm_infer.cli_answers import show_answer, write
from llm_infer.errors import UserError
from llm_infer.interrupts import uninterrupted

if TYPE_CHECKING:
    from llm_infer.decoding.sampling_params import SamplingParams
    from llm_infer.decoding.structured import StructuredOutputsParams
    from llm_infer.llm import LLM

app = typer.Typer(
    name="llm-infer",
    help="Runs large language models on CPUs, NVIDIA GPUs and Cloud TPUs.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"llm-infer {version('llm-infer')}")
        except PackageNotFoundError:
            print("llm-infer (not installed: run from its source)")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None: ...


bench = typer.Typer(help="Measures speed and memory; every figure names its unit.", no_args_is_help=True)
app.add_typer(bench, name="bench", rich_help_panel=None)


def _existing_model(name: str) -> str:
    """Refuses a name that no model can have, before JAX is imported, which takes seconds."""
    from llm_infer.models.architectures import architecture_names
    from llm_infer.weights.model_names import why_unknown

    if (problem := why_unknown(name)) is not None:
        if name in architecture_names():
            problem = (
                f"{name!r} is an architecture without weights: give the directory or hub id of weights, or for random "
                "ones --load-format dummy (of generate and bench offline)"
            )
        raise UserError(problem)
    return name


def _writable_file(name: str | None) -> str | None:
    """Refuses a file that cannot be written before minutes are spent on what is to be in it."""
    if name is not None:
        existed = os.path.exists(name)
        try:
            with open(name, "a"):
                pass
            if not existed:
                os.remove(name)
        except OSError as error:
            raise UserError(f"--json {name} cannot be written: {error.strerror}") from None
    return name


DEFAULT_MODEL_NAME = "smollm2-135m-instruct"
MODEL_HELP = "Default model, a GGUF file, a Hugging Face or converted directory, hub id."
Model = Annotated[str, typer.Option(help=MODEL_HELP, callback=_existing_model)]
AnyModel = Annotated[str, typer.Option("--model", help=MODEL_HELP)]
"""Or, with random weights, a published architecture: see `_check_model`."""
MaxTokens = Annotated[int, typer.Option(help="Most new tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token each time.")]
TopK = Annotated[int, typer.Option(help="Keep the k most likely tokens; -1 keeps all.")]
TopP = Annotated[float, typer.Option(help="Keep the most likely tokens with this probability mass.")]
Seed = Annotated[int | None, typer.Option(help="Makes random draws repeatable.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest sequence in tokens; default: the model's context.")]
LoadFormat = Annotated[str, typer.Option(help="auto, or dummy: random weights of an architecture of `models`.")]
Precision = Annotated[str, typer.Option(help="exact, or fast: int8 activations and bfloat16 pages, on CPUs.")]
Dtype = Annotated[
    str, typer.Option(help="Of weights and activations: auto (float32 on CPUs, else bfloat16), float32 …")
]
Device = Annotated[str, typer.Option(help="auto, or run only where JAX finds cpu, gpu or tpu.")]
MemoryUtilization = Annotated[
    float | None,
    typer.Option("--memory-utilization", "--gpu-memory-utilization", help="Share of device memory to use (0.9)."),
]
TensorParallel = Annotated[
    int | None, typer.Option("--tensor-parallel-size", "-tp", help="Devices over which every layer is cut.")
]
DataParallel = Annotated[
    int | None, typer.Option("--data-parallel-size", "-dp", help="Shards of the batch, each on devices of its own.")
]
ExpertParallel = Annotated[int | None, typer.Option(help="Devices over which the experts of a mixture are spread.")]
CoordinatorAddress = Annotated[
    str | None, typer.Option(help="With several hosts: address and free port of process 0, as in 10.0.0.1:8476.")
]
NumProcesses = Annotated[int | None, typer.Option(help="With several hosts: processes, one on each.")]
ProcessId = Annotated[int | None, typer.Option(help="With several hosts: number of this process, from 0.")]
ConfigFile = Annotated[
    str | None, typer.Option("--config", help="TOML file with engine arguments; flags go before it.")
]
JsonFile = Annotated[
    str | None, typer.Option("--json", help="Also write the figures to this file.", callback=_writable_file)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads it from standard input.")],
    model: AnyModel = DEFAULT_MODEL_NAME,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text itself, without the chat template.")] = False,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = -1,
    top_p: TopP = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Keep tokens with this share of the most likely one's probability.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: avoid tokens that were there before.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given again.")] = None,
    json_schema: Annotated[str | None, typer.Option(help="File with a JSON schema that the answer follows.")] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            help="After the answer, write each token's log-probability, and of so many likely ones, to stderr."
        ),
    ] = None,
    seed: Seed = None,
    max_model_len: MaxModelLen = None,
    load_format: LoadFormat = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    precision: Precision = "exact",
    memory_utilization: MemoryUtilization = None,
    tensor_parallel_size: TensorParallel = None,
    data_parallel_size: DataParallel = None,
    expert_parallel_size: ExpertParallel = None,
    coordinator_address: CoordinatorAddress = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    config: ConfigFile = None,
    debug: Debug = False,
) -> None:
    """Answers one prompt, streaming the text to standard output."""
    _check_model(model, load_format, config)
    params = _sampling_params(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop or (),
        structured_outputs=_structured(json_schema),
        logprobs=logprobs,
        seed=seed,
    )
    text = _standard_input() if prompt == "-" else prompt
    if not text.strip():
        raise UserError("the prompt is empty: give some text, or '-' to read it from standard input")
    arguments = _engine_arguments(
        config,
        max_model_len=max_model_len,
        load_format=load_format,
        device=device,
        dtype=dtype,
        precision=precision,
        memory_utilization=memory_utilization,
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        expert_parallel_size=expert_parallel_size,
        coordinator_address=coordinator_address,
        num_processes=num_processes,
        process_id=process_id,
    )
    llm = _interactive_llm(model, arguments)
    ids = llm.tokenizer.encode(text)
    if not raw and llm.tokenizer.chat_template is not None:
        ids = llm.chat_prompt([{"role": "user", "content": text}])
    show_answer(llm.stream(ids, params), params)


@app.command()
def chat(
    model: AnyModel = DEFAULT_MODEL_NAME,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = -1,
    top_p: TopP = 1.0,
    seed: Seed = None,
    max_model_len: MaxModelLen = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    precision: Precision = "exact",
    memory_utilization: MemoryUtilization = None,
    tensor_parallel_size: TensorParallel = None,
    data_parallel_size: DataParallel = None,
    expert_parallel_size: ExpertParallel = None,
    coordinator_address: CoordinatorAddress = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    config: ConfigFile = None,
    debug: Debug = False,
) -> None:
    """Talks with the model, turn by turn. Ctrl-C stops an answer; /reset starts anew; Ctrl-D or /exit leaves."""
    _check_model(model, "auto", config)
    params = _sampling_params(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    arguments = _engine_arguments(
        config,
        max_model_len=max_model_len,
        device=device,
        dtype=dtype,
        precision=precision,
        memory_utilization=memory_utilization,
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        expert_parallel_size=expert_parallel_size,
        coordinator_address=coordinator_address,
        num_processes=num_processes,
        process_id=process_id,
    )
    llm = _interactive_llm(model, arguments)
    start: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    llm.chat_prompt([*start, {"role": "user", "content": "hello"}])  # a model without a template fails here, not later
    messages = list(start)
    print("Ctrl-C stops an answer, /reset starts anew, /exit or Ctrl-D leaves.", file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)", file=sys.stderr)
            continue
        if line in ("/exit", "/quit"):
            break
        if line == "/reset":
            messages = list(start)
        elif line.startswith("/"):
            print(f"unknown command {line.split()[0]}: /reset starts anew, /exit leaves", file=sys.stderr)
        elif line:
            messages = _answer(llm, [*messages, {"role": "user", "content": line}], params)


def _answer(llm: LLM, messages: list[dict[str, Any]], params: SamplingParams) -> list[dict[str, Any]]:
    """Streams one answer; returns the conversation with it, or without the question if that does not fit."""
    answer = []
    try:
        stream = llm.stream_chat(messages, params)
        try:
            for chunk in stream:
                write(chunk.text)
                answer.append(chunk.text)
        finally:
            stream.close()  # type: ignore[attr-defined]
    except KeyboardInterrupt:
        print("\n(stopped)", end="", file=sys.stderr)
    except UserError as error:
        print(f"error: {error} (/reset starts a new conversation)", file=sys.stderr)
        return messages[:-1]
    write("\n")
    return [*messages, {"role": "assistant", "content": "".join(answer)}]


@app.command()
def models(debug: Debug = False) -> None:
    """Lists the architectures that run with random weights: parameters, memory of weights and KV pages."""
    from llm_infer.models.architectures import table

    print(table())


@app.command()
def kernels(
    tune: Annotated[bool, typer.Option("--tune", help="Measure this machine (under a minute) and keep it.")] = False,
    chip: Annotated[str | None, typer.Option(help="Only one: here, v5e, v6e, v5p, tpu7x or sm_90.")] = None,
    debug: Debug = False,
) -> None:
    """Which kernel runs each operation on this machine and on known chips, and why; --tune measures this CPU's crossovers."""
    from llm_infer.kernel_report import choices, report, tune_machine

    if tune:
        tune_machine()
    print(choices(chip))
    if chip in (None, "here"):
        print()
        print(report())


@app.command()
def doctor(debug: Debug = False) -> None:
    """Reports what this machine has and what is missing for full speed."""
    from llm_infer.doctor import report

    print(report())


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A model as for --model.", callback=_existing_model)],
    dest: Annotated[str, typer.Argument(help="Directory to write, new or empty; give it to --model afterwards.")],
    dtype: Annotated[str, typer.Option(help="Type of the parameters: float32 or bfloat16.")] = "float32",
    debug: Debug = False,
) -> None:
    """Writes a model as an Orbax checkpoint that loads without any conversion."""
    from llm_infer.loading import convert as run
    from llm_infer.weights.progress import Progress

    print(run(source, dest, dtype=dtype, progress=Progress()))


@bench.command()
def offline(
    model: AnyModel = DEFAULT_MODEL_NAME,
    batch: Annotated[str, typer.Option(help="Batch sizes, comma separated.")] = "1,8,32",
    prompt_tokens: Annotated[int, typer.Option(help="Prompt length of the decode runs.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="New tokens of each sequence.")] = 64,
    prefill_tokens: Annotated[int, typer.Option(help="Prompt length of the prefill run.")] = 512,
    rounds: Annotated[int, typer.Option(help="Repetitions; medians are reported.")] = 3,
    json_file: JsonFile = None,
    num_scheduler_steps: Annotated[int, typer.Option(help="Decode steps that run as one program.")] = 1,
    load_format: LoadFormat = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    precision: Precision = "exact",
    tensor_parallel_size: TensorParallel = None,
    data_parallel_size: DataParallel = None,
    expert_parallel_size: ExpertParallel = None,
    memory_utilization: MemoryUtilization = None,
    config: ConfigFile = None,
    debug: Debug = False,
) -> None:
    """Prefill and decode throughput, latencies, where the time of a step goes, and how full the pages are."""
    _check_model(model, load_format, config)
    from llm_infer.bench.offline import run

    arguments = _engine_arguments(
        config,
        num_scheduler_steps=num_scheduler_steps,
        load_format=load_format,
        device=device,
        dtype=dtype,
        precision=precision,
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        expert_parallel_size=expert_parallel_size,
        memory_utilization=memory_utilization,
    )
    run(model, batch, prompt_tokens, new_tokens, prefill_tokens, rounds, json_file, arguments)


@bench.command()
def context(
    model: Model = DEFAULT_MODEL_NAME,
    contexts: Annotated[str, typer.Option(help="Context lengths, comma separated.")] = "128,512,1024,2048",
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after each context.", min=8)] = 32,
    rounds: Annotated[int, typer.Option(help="Repetitions; the smallest time counts.")] = 3,
    json_file: JsonFile = None,
    precision: Precision = "exact",
    debug: Debug = False,
) -> None:
    """Time per token at batch 1 by context length, beside the time that reading the keys and values takes."""
    from llm_infer.bench.context import run

    run(model, contexts, new_tokens, rounds, precision, json_file)


@bench.command()
def memory(
    model: Model = DEFAULT_MODEL_NAME,
    pool: Annotated[int, typer.Option(help="Page pool in MB.", min=1)] = 64,
    json_file: JsonFile = None,
    precision: Precision = "exact",
    debug: Debug = False,
) -> None:
    """Memory of decoding at batch 1 beyond that of importing the packages."""
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
    """What the time of a decode step goes to: each native kernel, the rest of the program, the host."""
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
    """What beam search, speculation, sampling parameters and structured output cost and save."""
    from llm_infer.bench.decoding import run

    run(model, spec_bench, rounds, json_file, precision)


@bench.command()
def startup(
    model: Model = DEFAULT_MODEL_NAME,
    rounds: Annotated[int, typer.Option(help="Warm starts; the median is reported.")] = 3,
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Time from starting `llm-infer generate` to its first token: caches empty (cold) and filled (warm)."""
    from llm_infer.bench.startup import run

    run(model, rounds, json_file)


@bench.command()
def peers(
    model: Model = DEFAULT_MODEL_NAME,
    llama_cpp: Annotated[str | None, typer.Option(help="A Python that has llama-cpp-python.")] = None,
    transformers: Annotated[str | None, typer.Option(help="A Python that has transformers, torch and gguf.")] = None,
    openvino: Annotated[str | None, typer.Option(help="A Python that has openvino-genai.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds through all engines; medians are reported.", min=1)] = 3,
    threads: Annotated[int | None, typer.Option(help="Threads of each engine; default: all cores.", min=1)] = None,
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Our throughput beside that of other engines on the same GGUF file, measured in turn on this machine."""
    from llm_infer.bench.peers import run

    pythons = {"llama.cpp": llama_cpp, "transformers": transformers, "openvino": openvino}
    run(model, pythons, rounds, threads, json_file)


@bench.command()
def quality(
    model: Model = DEFAULT_MODEL_NAME,
    text: Annotated[str | None, typer.Option(help="A text file; default: prose that comes with Python.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to compare.", min=2)] = 4096,
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """What `--precision fast` changes: agreement of the most likely token, KL divergence and perplexity on a text."""
    from llm_infer.bench.quality import run

    run(model, text, tokens, json_file)


@bench.command("kernels")
def bench_kernels(
    target: Annotated[str, typer.Option(help="Chip to compile for: v5e, v6e, v5p, tpu7x or sm_90.")],
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """What the compiler for a chip says of each kernel: estimated cycles, bytes, spills. Needs no such chip."""
    from llm_infer.bench.kernels import run

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
    """Compiles prefill and decode steps for TPU slices and a GPU that need not be here: memory, collectives, time."""
    from llm_infer.bench.aot import run

    run(models, slices, tokens, write, json_file, limit)


@bench.command()
def host(
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """What the host spends on a decode step of 64 and of 256 sequences when the device takes no time."""
    from llm_infer.bench.host import run

    run((64, 256), json_file)


@bench.command()
def cache(debug: Debug = False) -> None:
    """Memory use of paged against contiguous allocation, by simulation of the allocator alone."""
    from llm_infer.kvcache.simulate import table

    print(table())


def _check_model(name: str, load_format: str, config: str | None) -> None:
    """As `_existing_model`, unless the weights may be random ones, which a file of `--config` may ask for, too."""
    if load_format == "auto" and config is None:
        _existing_model(name)


def _sampling_params(**values: Any) -> SamplingParams:
    from llm_infer.decoding.sampling_params import SamplingParams

    return SamplingParams(**values)


def _structured(schema_file: str | None) -> StructuredOutputsParams | None:
    from llm_infer.decoding.structured import StructuredOutputsParams

    if schema_file is None:
        return None
    try:
        with open(schema_file, encoding="utf-8") as file:
            return StructuredOutputsParams(json=file.read())
    except OSError as error:
        raise UserError(f"--json-schema {schema_file}: {error.strerror}") from None
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"--json-schema {schema_file}: {error}") from None


def _interactive_llm(model: str, arguments: dict[str, Any]) -> LLM:
    """An engine for one user: one sequence at a time, so that few rows are computed and little memory is taken."""
    from llm_infer.llm import LLM
    from llm_infer.parallel.distributed import on_cluster

    if "coordinator_address" in arguments or on_cluster():
        _keep_stdout_for_answers()
    return LLM(model, **{"max_num_seqs": 1, "max_num_batched_tokens": 512, **arguments})


def _keep_stdout_for_answers() -> None:
    """Drops what libraries write to descriptor 1, or with `--debug` sends it to standard error.

    Gloo, which connects CPUs, reports there each connection that it makes.
    """
    sys.stdout.flush()
    answers = os.dup(1)
    os.dup2(2 if "--debug" in sys.argv[1:] else os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = open(answers, "w", encoding="utf-8", errors="replace")  # noqa: SIM115


FLAG_DEFAULTS = {
    "load_format": "auto",
    "device": "auto",
    "dtype": "auto",
    "precision": "exact",
    "num_scheduler_steps": 1,
}
"""Flags at these values leave a setting to the file of `--config`, and without one to `LLM`."""


def _engine_arguments(config: str | None, **flags: Any) -> dict[str, Any]:
    """Arguments of `LLM` from the file of `--config`, and over them the flags that were given."""
    with uninterrupted():  # imports JAX: Ctrl-C within an extension module would be another error, or none
        from llm_infer.engine_arguments import read_engine_arguments

    arguments = {} if config is None else read_engine_arguments(config)
    return arguments | {name: value for name, value in flags.items() if value != FLAG_DEFAULTS.get(name)}


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text: {error.reason} at byte {error.start}") from None


def main() -> None:
    """Entry point: user errors are one line and exit code 1 (2 for a wrong call); `--debug` shows the traceback."""
    debug = "--debug" in sys.argv[1:]
    if sys.argv[1:] in ([], ["bench"]):
        sys.argv.append("--help")
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character must not end the answer
    # JAX would print a warning on machines with a TPU library or GPU driver that it does not use.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if "JAX_PLATFORMS" not in os.environ and accelerators.none_is_here():
        os.environ["JAX_PLATFORMS"] = "cpu"
    # JAX would set aside three quarters of a GPU; how much of it is used is for --memory-utilization to say.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
    try:
        sys.exit(app(prog_name="llm-infer", standalone_mode=False) or 0)
    except UserError as error:
        if debug:
            raise
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        # click's own errors (unknown flag, missing argument) carry an exit code and a message for the user.
        if debug or not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        command = "llm-infer" if context is None else context.command_path
        message = error.format_message()  # type: ignore[attr-defined]
        if "unexpected extra argument" in message and command.endswith("generate"):
            message += "; a prompt of several words stands in quotes"
        _fail(f"{message} (see {command} --help)", getattr(error, "exit_code", 2))


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
