"""Jinja sandbox with a budget, since chat templates come with a model and are not ours.

Blocks, filters and globals are those of Hugging Face's templates (`raise_exception`, `strftime_now`, a `tojson` that
does not escape HTML, `{% generation %}`, `break`/`continue`). The budget bounds loops, calls, numbers that functions
and filters take, repetition and output, so that a template cannot hang the engine or fill its memory in the usual ways.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 2_000_000  # of one rendering; some templates loop over all messages for each message. Seconds at worst
_CALL_STEPS = 40  # a call costs about as much as this many loop passes
_MAX_SIZE = 1 << 26  # characters of a text, items of a list, and characters put out in all
_COUNTED = "counted loop"  # a filter name no template can spell


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; here it is its content."""

    tags = frozenset({"generation"})  # pyright: ignore[reportAssignmentType, reportIncompatibleVariableOverride]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Sandbox for one rendering: refuses Python's internals, changes to arguments, and more work than the budget."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, max_steps: int = MAX_STEPS) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, loopcontrols],
            finalize=self._finalize,
        )
        self._max_steps = self._steps_left = max_steps
        self._output_left = _MAX_SIZE
        self.filters["tojson"] = _to_json
        self.filters = {name: _guarded(function) for name, function in self.filters.items()}
        self.filters[_COUNTED] = _counted
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        del self.globals["lipsum"]  # random filler, of any length

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            plain_text = sum(len(piece.data) for piece in loop.find_all(nodes.TemplateData))
            size = nodes.Const(plain_text, lineno=loop.lineno)
            loop.iter = nodes.Filter(loop.iter, _COUNTED, [size], [], None, None, lineno=loop.lineno)
        return tree

    def count(self, steps: int, characters: int) -> None:
        """Takes work and output off the budget; a loop pass is one step."""
        self._steps_left -= steps
        self._output_left -= characters
        if self._steps_left < 0:
            raise SecurityError(f"it takes more than {self._max_steps} steps (a loop pass is 1, a call {_CALL_STEPS})")
        if self._output_left < 0:
            raise SecurityError(f"it puts out more than {_MAX_SIZE} characters")

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call of a template, macros and methods included."""
        self.count(_CALL_STEPS, 0)
        _check_numbers((*args, *kwargs.values()))
        return _check_size(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Every use of an intercepted operator."""
        powers = operator == "**" and isinstance(left, int) and isinstance(right, int)
        if powers and left.bit_length() * right > 4096:
            raise SecurityError(f"{left} ** {right} is too large")
        if operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(items, (str, list, tuple)) and isinstance(times, int) and len(items) * times > _MAX_SIZE:
                    raise SecurityError(f"it repeats something to more than {_MAX_SIZE} characters or items")
        return _check_size(super().call_binop(context, operator, left, right))

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """A forbidden attribute is an error at once; Jinja would wait until it is used."""
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe")

    def _finalize(self, value: Any) -> Any:
        self.count(0, len(value) if isinstance(value, str) else 1)
        return value


@jinja2.pass_environment
def _counted(environment: TemplateSandbox, items: Iterable[Any], plain_text: int) -> Iterator[Any]:
    for item in items:
        environment.count(1, plain_text)
        yield item


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses huge widths and counts; the piped value itself may be any number."""
    first = 2 if hasattr(function, "jinja_pass_arg") else 1

    @wraps(function)  # keeps Jinja's mark of what to pass
    def run(*args: Any, **kwargs: Any) -> Any:
        _check_numbers((*args[first:], *kwargs.values()))
        return _check_size(function(*args, **kwargs))

    return run


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > _MAX_SIZE:
            raise SecurityError(f"it calls a function with the number {value:.3g}, beyond {_MAX_SIZE}")


def _check_size(value: Any) -> Any:
    if isinstance(value, (str, list, tuple)) and len(value) > _MAX_SIZE:
        raise SecurityError(f"it makes a value of more than {_MAX_SIZE} characters or items")
    return value


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
