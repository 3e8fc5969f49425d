"""Reads options of benchmarks that list whole numbers."""

from __future__ import annotations

from llm_infer.base.errors import UserError


def whole_numbers(flag: str, text: str, least: int, meant: str, example: str) -> list[int]:
    """Returns the numbers of a comma-separated option.

    Args:
        flag: the option's, for the message.
        text: what was typed.
        least: the smallest number that makes sense.
        meant: what the numbers are.
        example: of what can be typed.

    Raises:
        UserError: there are none, one is no whole number, or one is too small.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least:
        raise UserError(f"{flag} {text!r}: expected {meant} separated by commas, such as {example}")
    return numbers
