"""What the commands that answer have in common: an engine for one user, and prompts from files."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from llm_infer.base.errors import UserError
from llm_infer.base.files import read_json
from llm_infer.base.interrupts import uninterrupted
from llm_infer.options import EngineOptions

if TYPE_CHECKING:
    from llm_infer.decoding.sampling_params import SamplingParams
    from llm_infer.llm import LLM

Messages = list[dict[str, Any]]


def for_requests(options: EngineOptions, params: SamplingParams, *, quiet: bool) -> EngineOptions:
    """Returns the options with room for all sequences of a request, and without progress if `quiet`."""
    rows = max(options.max_num_seqs, params.num_sequences)
    return replace(options, max_num_seqs=rows, progress=options.progress and not quiet)


def interactive_llm(options: EngineOptions) -> LLM:
    """Makes the model's LLM; a process that is not the first of several hosts stays here until the first has ended."""
    with uninterrupted():  # imports JAX: Ctrl-C within an extension module would be another error, or none
        from llm_infer.llm import LLM
        from llm_infer.parallel.distributed import on_cluster
        from llm_infer.starting import take_part

    if options.coordinator_address is not None or on_cluster():
        _keep_stdout_for_answers()
        if take_part(options):
            raise typer.Exit
    llm = LLM.of(options)
    if options.load_format == "dummy" and options.progress and llm.tokenizer.decode([256]) == "<256>":
        print(
            "note: the weights are random and come without a tokenizer: the numbers in the answer are ids of tokens",
            file=sys.stderr,
        )
    return llm


def _keep_stdout_for_answers() -> None:
    """Drops what libraries write to descriptor 1, or with `--debug` sends it to standard error.

    Gloo, which connects CPUs, reports there each connection that it makes.
    """
    sys.stdout.flush()
    answers = os.dup(1)
    os.dup2(2 if "--debug" in sys.argv[1:] else os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = open(answers, "w", encoding="utf-8", errors="replace")  # noqa: SIM115


def read_conversation(path: str, flag: str) -> Messages:
    """Reads a conversation as `/save` writes it: a JSON list of messages.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    found = read_json(path, f"{flag} {path}")
    shape = isinstance(found, list) and all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str | list)
        for one in found
    )
    if not shape or not found:
        raise UserError(f'{flag} {path}: expected a list of messages, [{{"role": "user", "content": "…"}}, …]')
    return found
