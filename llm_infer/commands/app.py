"""The command line: `llm-infer generate | chat | convert | models | bench | doctor`. Answers go to stdout, the rest to stderr."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_infer.base import accelerators
from llm_infer.base.errors import UserError
from llm_infer.commands.answers import show_answer, write
from llm_infer.commands.bench import bench
from llm_infer.commands.models import commands as models
from llm_infer.commands.options import (
    DEFAULT_MODEL_NAME,
    AnyModel,
    ConfigFile,
    CoordinatorAddress,
    DataParallel,
    Debug,
    Device,
    Dtype,
    ExpertParallel,
    LoadFormat,
    MaxModelLen,
    MaxTokens,
    MemoryUtilization,
    NumProcesses,
    Precision,
    ProcessId,
    Seed,
    Temperature,
    TensorParallel,
    TopK,
    TopP,
    check_model,
    engine_arguments,
)

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


app.add_typer(bench, name="bench", rich_help_panel=None)
app.add_typer(models)


@app.command()
def generate(
    context: typer.Context,
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
    regex: Annotated[str | None, typer.Option(help="Regular expression that the whole answer matches.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="The answer is one of these; give it several times.")] = None,
    grammar: Annotated[str | None, typer.Option(help="File with a grammar (Lark) that the answer follows.")] = None,
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
    check_model(model, load_format, config)
    params = _sampling_params(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop or (),
        structured_outputs=_structured(json_schema, regex, choice, grammar),
        logprobs=logprobs,
        seed=seed,
    )
    text = _standard_input() if prompt == "-" else prompt
    if not text.strip():
        raise UserError("the prompt is empty: give some text, or '-' to read it from standard input")
    arguments = engine_arguments(
        config,
        context,
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
    context: typer.Context,
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
    check_model(model, "auto", config)
    params = _sampling_params(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    arguments = engine_arguments(
        config,
        context,
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
def kernels(
    tune: Annotated[bool, typer.Option("--tune", help="Measure this machine (under a minute) and keep it.")] = False,
    chip: Annotated[str | None, typer.Option(help="Only one: here, v5e, v6e, v5p, tpu7x or sm_90.")] = None,
    debug: Debug = False,
) -> None:
    """Which kernel runs each operation on this machine and on known chips, and why; --tune measures this CPU's crossovers."""
    from llm_infer.commands.kernels import choices, report, tune_machine

    if tune:
        tune_machine()
    print(choices(chip))
    if chip in (None, "here"):
        print()
        print(report())


@app.command()
def doctor(debug: Debug = False) -> None:
    """Reports what this machine has and what is missing for full speed."""
    from llm_infer.commands.doctor import report

    print(report())


def _sampling_params(**values: Any) -> SamplingParams:
    from llm_infer.decoding.sampling_params import SamplingParams

    return SamplingParams(**values)


def _structured(
    schema_file: str | None, regex: str | None, choice: list[str] | None, grammar_file: str | None
) -> StructuredOutputsParams | None:
    """What the answer must look like; the schema and the grammar are read from files."""
    from llm_infer.decoding.structured import StructuredOutputsParams

    values = {"--json-schema": schema_file, "--regex": regex, "--choice": choice or None, "--grammar": grammar_file}
    given = {flag: value for flag, value in values.items() if value is not None}
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: an answer follows one of them")
    for flag, value in given.items():
        shown = value if isinstance(value, str) else " ".join(value)
        try:
            if flag in ("--json-schema", "--grammar"):
                with open(str(value), encoding="utf-8") as file:
                    value = file.read()
            return StructuredOutputsParams(**{_FIELDS[flag]: value})
        except OSError as error:
            raise UserError(f"{flag} {shown}: {error.strerror}") from None
        except (UserError, UnicodeDecodeError) as error:
            raise UserError(f"{flag} {shown}: {error}") from None
    return None


_FIELDS = {"--json-schema": "json", "--regex": "regex", "--choice": "choice", "--grammar": "grammar"}


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


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text: {error.reason} at byte {error.start}") from None


INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


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
        code = app(prog_name="llm-infer", standalone_mode=False) or 0
        if code == INTERRUPTED:  # typer makes this of Ctrl-C, and says nothing
            raise KeyboardInterrupt
        sys.exit(code)
    except UserError as error:
        if debug:
            raise
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
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
