"""The command line: `llm-infer`. Answers go to stdout, all else to stderr."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from llm_infer.base import accelerators
from llm_infer.base.errors import UserError
from llm_infer.commands.bench import bench
from llm_infer.commands.chat import chat
from llm_infer.commands.command import Commands
from llm_infer.commands.generate import generate
from llm_infer.commands.models import commands as models
from llm_infer.commands.options import Debug
from llm_infer.commands.serve import serve
from llm_infer.commands.user_file import COMMANDS, user_defaults

app = Commands(
    name="llm-infer",
    help="Runs language models on CPUs, NVIDIA GPUs and Cloud TPUs.",
    no_args_is_help=True,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},  # --max_tokens, as vLLM takes it
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
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    # Only for the commands that take them: a mistake in the file must not keep the others from helping to find it.
    if context.invoked_subcommand in COMMANDS and "--help" not in sys.argv[1:]:
        context.default_map = user_defaults()


app.command()(generate)
app.command()(chat)
app.command()(serve)
app.add_typer(models)
app.add_typer(bench, name="bench")


@app.command()
def kernels(
    tune: Annotated[bool, typer.Option("--tune", help="Measure this machine (under a minute) and keep it.")] = False,
    chip: Annotated[str | None, typer.Option(help="Only one: here, v5e, v6e, v5p, tpu7x or sm_90.")] = None,
    debug: Debug = False,
) -> None:
    """Shows which kernels run here and on known chips, and why.

    --tune measures from how many rows on which of them are faster on this CPU.
    """
    from llm_infer.commands.kernels import choices, report, tune_machine

    if tune:
        tune_machine()
    print(choices(chip))
    if chip in (None, "here"):
        print()
        print(report())


@app.command()
def doctor(debug: Debug = False) -> None:
    """Reports what this machine has and what it lacks."""
    from llm_infer.commands.doctor import report

    print(report())


INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def main() -> None:
    """Runs the command line: user errors are one line and exit code 1 (2 for a wrong call); `--debug` shows the traceback."""
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
