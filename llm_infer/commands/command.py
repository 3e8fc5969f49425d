"""How functions become commands: their flags come from their signatures and from tables, and help names values in English."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
import typer.core

Function = TypeVar("Function", bound=Callable[..., Any])

_VALUES = {int: "N", float: "X", str: "TEXT", list: "TEXT"}
"""What help calls a value of a type."""


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag that commands have in common.

    Attributes:
        name: of the argument that the command gets; the flag is `--name` with dashes.
        kind: type of its value; bool is a flag without one, a list one that may be given again.
        help: one line.
        default: where it is not typed.
        short: a second, short name, or "".
        value: what help calls the value; "" goes by the type.
        aliases: other long names, as other engines have them.
    """

    name: str
    kind: Any
    help: str
    default: Any = None
    short: str = ""
    value: str = ""
    aliases: tuple[str, ...] = ()

    def parameter(self) -> inspect.Parameter:
        """Returns the flag as a parameter of a function."""
        names = ["--" + self.name.replace("_", "-"), *self.aliases, *([self.short] if self.short else [])]
        option = typer.Option(*names, help=self.help, metavar=self.value or None)
        kind = self.kind if self.default is not None else self.kind | None
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=Annotated[kind, option]
        )


def with_flags(flags: Sequence[Flag], *, before: str, **defaults: Any) -> Callable[[Function], Function]:
    """Gives a function with a parameter `**rest` these flags, which arrive there.

    Args:
        flags: table of flags.
        before: parameter before which help shows them.
        defaults: of this command, where they differ from the table's.
    """

    def add(function: Function) -> Function:
        signature, hints = inspect.signature(function), get_type_hints(function, include_extras=True)
        own = [
            each.replace(annotation=hints[each.name], kind=inspect.Parameter.KEYWORD_ONLY)
            for each in signature.parameters.values()
            if each.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        at = next(index for index, each in enumerate(own) if each.name == before)
        new = [flag.parameter() for flag in flags]
        new = [each.replace(default=defaults.get(each.name, each.default)) for each in new]
        every = [*own[:at], *new, *own[at:]]
        function.__signature__ = signature.replace(parameters=every)  # type: ignore[attr-defined]
        function.__annotations__ = {each.name: each.annotation for each in every} | {"return": None}
        return function

    return add


class _Command(typer.core.TyperCommand):
    """A command whose help shows no Python types."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the options and arguments, without the types that typer shows behind names."""
        write = formatter.write_dl

        def without_types(rows: Sequence[tuple[str, str]], *args: Any, **settings: Any) -> None:
            write([(_PYTHON_TYPE.sub("", name), text) for name, text in rows], *args, **settings)

        formatter.write_dl = without_types
        super().format_options(ctx, formatter)


_PYTHON_TYPE = re.compile(r" <[\w\[\]]+>$")


class Commands(typer.Typer):
    """A group of commands whose help has no Python types and no colours."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(rich_markup_mode=None, pretty_exceptions_enable=False, **settings)

    def command(self, *args: Any, **settings: Any) -> Callable[[Function], Function]:
        """Registers a function, as `typer.Typer.command` does."""
        register = super().command(*args, cls=_Command, **settings)

        def named(function: Function) -> Function:
            hints = get_type_hints(function, include_extras=True)
            for name, hint in hints.items():
                if get_origin(hint) is Annotated:
                    kind, option = get_args(hint)[:2]
                    option.metavar = option.metavar or _value(name, kind, option)
            function.__annotations__ = hints  # or they would be evaluated again, without those names
            return register(function)

        return named


def _value(name: str, kind: Any, option: Any) -> str | None:
    """Returns what help calls the value of an option or argument; None for a flag without one."""
    if isinstance(option, typer.models.ArgumentInfo):
        return name.upper()
    kinds = [each for each in (get_args(kind) if get_origin(kind) is not list else [list]) or [kind] if each]
    kinds = [get_origin(each) or each for each in kinds if each is not type(None)]
    return _VALUES.get(kinds[0])
