"""What the programs share: the order of the measurements, and the JSON lines that say what was found."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

PREFILL = 512
PROMPT = 128
SIZES = (1, 8, 32)


def depth_metric(depth: int) -> str:
    """Returns the name of the metric for decoding one sequence with so many tokens before it."""
    return f"decode_b1_d{depth}"


def report_all(
    version: str,
    precision: str,
    prefill: Callable[[int], float],
    decode: Callable[[int, int], float],
    depths: Iterable[int],
) -> None:
    """Measures everything in turn and prints each figure as it comes; a measurement that raises costs its own figure.

    Args:
        version: the engine's.
        precision: of weights, products and cache, in a few words.
        prefill: gives tok/s of one prompt of so many tokens.
        decode: gives tok/s of so many sequences together, each with so many tokens before it.
        depths: of the measurements at batch 1; at depth 0 there is the one token that a step needs.
    """

    def report(metric: str, measure: Callable[[], float]) -> None:
        line: dict[str, str | float | None] = {"metric": metric, "version": version, "precision": precision}
        try:
            line["value"] = measure()
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), "")
            line.update(value=None, why=reason or type(error).__name__)
        print(json.dumps(line), flush=True)

    report(f"prefill_{PREFILL}", lambda: prefill(PREFILL))
    for size in SIZES:
        report(f"decode_b{size}", lambda size=size: decode(size, PROMPT))
    for depth in depths:
        report(depth_metric(depth), lambda depth=depth: decode(1, max(1, depth)))


def numbers(text: str) -> list[int]:
    """Reads the argument that lists depths."""
    return [int(part) for part in text.split(",") if part]
