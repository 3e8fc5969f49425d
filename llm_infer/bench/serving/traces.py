"""Recorded load: CSV files of Azure and BurstGPT, and Mooncake's JSON lines, whose block hashes become shared prefixes."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from llm_infer.base.errors import UserError
from llm_infer.base.files import read_text
from llm_infer.bench.serving.requests import Conversation, Turn
from llm_infer.bench.serving.vocabulary import Vocabulary

BLOCK = 512
"""Tokens that one of Mooncake's hashes stands for."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request of a trace.

    Attributes:
        at: seconds after the first request.
        input_tokens, output_tokens: lengths of prompt and answer.
        blocks: names of the prompt's blocks of BLOCK tokens; the same name stands for the same tokens.
    """

    at: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def read_trace(path: str) -> list[Recorded]:
    """Reads a trace; its first line tells the format. Requests without an answer (BurstGPT's failures) are left out.

    Raises:
        UserError: it is no such file.
    """
    said = f"--dataset-path {path}"
    lines = read_text(path, said).lstrip("\ufeff").splitlines()
    first = lines[0].strip() if lines else ""
    if first.startswith("{"):
        found = _rows(said, ((number, line) for number, line in enumerate(lines, 1) if line.strip()), _mooncake)
    else:
        names = [name.strip().lower() for name in first.split(",")]
        columns = next((each for each in _COLUMNS if set(each) <= set(names)), None)
        if columns is None:
            raise UserError(
                f"{said}: expected a trace: CSV with TIMESTAMP,ContextTokens,GeneratedTokens (Azure) or "
                f"Timestamp,…,Request tokens,Response tokens (BurstGPT), or JSON lines with timestamp, input_length, "
                f"output_length and hash_ids (Mooncake); its first line is {first[:80]!r}"
            )
        places = [names.index(column) for column in columns]
        found = _rows(said, ((number, row) for number, row in enumerate(csv.reader(lines[1:]), 2) if row), _csv(places))
    found = [each for each in found if each.input_tokens > 0 and each.output_tokens > 0]
    if not found:
        raise UserError(f"{said}: no request in it")
    found.sort(key=lambda each: each.at)
    start = found[0].at
    return [Recorded(each.at - start, each.input_tokens, each.output_tokens, each.blocks) for each in found]


_COLUMNS = (
    ("timestamp", "contexttokens", "generatedtokens"),
    ("timestamp", "request tokens", "response tokens"),
)


def _rows(said: str, numbered: Iterable[tuple[int, object]], read) -> list[Recorded]:  # type: ignore[no-untyped-def]
    found = []
    for number, row in numbered:
        try:
            found.append(read(row))
            if not math.isfinite(found[-1].at):
                raise ValueError("its time is not finite")
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"{said}: line {number} cannot be read: {error}") from None
    return found


def _csv(places: list[int]):  # type: ignore[no-untyped-def]
    def read(row: list[str]) -> Recorded:
        time, context, generated = (row[place].strip() for place in places)
        return Recorded(_seconds(time), int(float(context)), int(float(generated)))

    return read


def _seconds(time: str) -> float:
    """Returns a time in seconds: a number, or a date with up to seven digits behind the seconds."""
    try:
        return float(time)
    except ValueError:
        whole, _, fraction = time.partition(".")
        digits = fraction.split("+")[0]
        return datetime.fromisoformat(whole + "+00:00").timestamp() + (float(f"0.{digits}") if digits else 0.0)


def _mooncake(line: str) -> Recorded:
    entry = json.loads(line)
    blocks = tuple(int(each) for each in entry.get("hash_ids", ()))
    return Recorded(float(entry["timestamp"]) / 1000, int(entry["input_length"]), int(entry["output_length"]), blocks)


def conversations(
    trace: list[Recorded],
    vocabulary: Vocabulary,
    seed: int,
    scale: float = 1.0,
    max_input: int | None = None,
    max_output: int | None = None,
) -> list[Conversation]:
    """Returns the requests of a trace, with random tokens.

    Args:
        trace: as `read_trace` returns it.
        vocabulary: that prompts are drawn from.
        seed: of the tokens.
        scale: requests come so many times as fast.
        max_input, max_output: longer prompts and answers are cut.
    """
    return [
        _conversation(each, index, vocabulary, seed, scale, max_input, max_output) for index, each in enumerate(trace)
    ]


def _conversation(
    recorded: Recorded,
    index: int,
    vocabulary: Vocabulary,
    seed: int,
    scale: float,
    max_input: int | None,
    max_output: int | None,
) -> Conversation:
    length = min(recorded.input_tokens, max_input or recorded.input_tokens)
    output = min(recorded.output_tokens, max_output or recorded.output_tokens)
    parts = list(_parts(recorded, index, vocabulary, seed, length))
    return Conversation([Turn(np.concatenate(parts)[:length], output, length)], recorded.at / scale)


def _parts(recorded: Recorded, index: int, vocabulary: Vocabulary, seed: int, length: int) -> Iterator[np.ndarray]:
    """Draws the blocks of a prompt, each from its own name, and what no block covers from the request's number."""
    covered = 0
    for block in recorded.blocks:
        if covered >= length:
            return
        yield vocabulary.draw(np.random.default_rng([seed, 1, block % 2**64]), BLOCK)
        covered += BLOCK
    if covered < length:
        yield vocabulary.draw(np.random.default_rng([seed, 2, index]), length - covered)
