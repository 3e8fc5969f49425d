"""`llm-infer generate`: one prompt, one answer."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from llm_infer.base.errors import UserError
from llm_infer.base.files import read_text
from llm_infer.commands.answers import answer, show_answer
from llm_infer.commands.command import with_flags
from llm_infer.commands.interactive import Messages, for_requests, interactive_llm, read_conversation
from llm_infer.commands.options import ONE_USER, Quiet, System, Threads, Verbose, takes_engine_options
from llm_infer.commands.sampling import FLAGS, sampling_params
from llm_infer.options import EngineOptions


@takes_engine_options(**ONE_USER)
@with_flags(FLAGS, before="threads")
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; '-' reads it from standard input.")] = None,
    prompt_flag: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt, as a flag.")] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option("--prompt-file", "-f", metavar="FILE", help="File with the prompt, or .json of chat's /save."),
    ] = None,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text itself, without the chat template.")] = False,
    threads: Threads = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    *,
    options: EngineOptions,
    **sampling: Any,
) -> None:
    """Answers one prompt; the text goes to standard output.

    It streams as it comes. All else that there is to say goes to standard error.
    """
    params = sampling_params(sampling)
    asked = _prompt(prompt, prompt_flag, prompt_file)
    llm = interactive_llm(for_requests(options, params, quiet=quiet))
    if raw or llm.tokenizer.chat_template is None:
        if system is not None or not isinstance(asked, str):
            why = "--raw leaves it out" if raw else "the model has none"
            raise UserError(f"a conversation or --system needs a chat template, and {why}: give plain text alone")
        ids = llm.tokenizer.encode(asked)
    else:
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        if system:
            rest = messages[1:] if messages[0]["role"] == "system" else messages
            messages = [{"role": "system", "content": system}, *rest]
        ids = llm.chat_prompt(messages)
    show_answer(answer(llm, ids, params), params, verbose=verbose)


def _prompt(argument: str | None, flag: str | None, file: str | None) -> str | Messages:
    """Returns the text, from wherever it is given, or the conversation of a .json file, to which a text is the next turn.

    Raises:
        UserError: it is given nowhere or several times, or is empty.
    """
    given = [each for each in (argument, flag, file) if each is not None]
    conversation = file is not None and file.lower().endswith(".json")
    if len(given) - conversation > 1 or not given:
        how = 'as in llm-infer generate "Why is the sky blue?", with --prompt or --prompt-file, or - for standard input'
        raise UserError(f"give {'one prompt only' if given else 'a prompt'}, {how}")
    if file is not None and conversation:
        messages = read_conversation(file, "--prompt-file")
        if len(given) > 1:
            return [*messages, {"role": "user", "content": _text(given[0])}]
        if messages[-1]["role"] == "assistant":
            raise UserError(f"--prompt-file {file} ends with an answer: give the next question, too")
        return messages
    # In a file the last line ends, too.
    return (
        _checked(read_text(file, f"--prompt-file {file}").removesuffix("\n")) if file is not None else _text(given[0])
    )


def _text(prompt: str) -> str:
    """Returns the prompt that was typed; '-' stands for standard input."""
    return _checked(_standard_input() if prompt == "-" else prompt)


def _checked(text: str) -> str:
    if not text.strip():
        raise UserError("the prompt is empty: give some text, or '-' to read it from standard input")
    return text


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text: {error.reason} at byte {error.start}") from None
