"""What the commands that answer have in common: an engine for one user, and prompts from files."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

from llm_infer.base.errors import UserError

if TYPE_CHECKING:
    from llm_infer.decoding.sampling_params import SamplingParams
    from llm_infer.llm import LLM

Messages = list[dict[str, Any]]


def interactive_llm(
    model: str, arguments: dict[str, Any], params: SamplingParams, *, config: str | None, quiet: bool
) -> LLM:
    """Makes an engine for one user: one request at a time, so that few rows are computed and little memory is taken.

    Args:
        model: name of the model.
        arguments: of `LLM`, from flags and the file of `--config`.
        params: of the requests; those of a beam search are as many sequences as it has beams.
        config: that file, which messages name.
        quiet: show no progress.
    """
    from llm_infer.llm import LLM
    from llm_infer.parallel.distributed import on_cluster

    if "coordinator_address" in arguments or on_cluster():
        _keep_stdout_for_answers()
    own = {"max_num_seqs": params.num_sequences, "max_num_batched_tokens": 512, "progress": not quiet}
    try:
        llm = LLM(model, **{**own, **arguments})
    except UserError as error:
        if config is not None and str(error).startswith("device="):
            raise UserError(f"--config {config}: {error}, in the file or with --device") from None
        raise
    if arguments.get("load_format") == "dummy" and not quiet and llm.tokenizer.decode([256]) == "<256>":
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
    try:
        found = json.loads(read_text(path, flag))
    except ValueError as error:
        raise UserError(f"{flag} {path}: not valid JSON ({error})") from None
    shape = isinstance(found, list) and all(isinstance(one, dict) and "role" in one for one in found)
    if not shape or not found:
        raise UserError(f'{flag} {path}: expected a list of messages, [{{"role": "user", "content": "…"}}, …]')
    return found


def read_text(path: str, flag: str) -> str:
    """Reads a text file.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
