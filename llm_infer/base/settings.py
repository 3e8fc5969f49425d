"""Settings as fields of a dataclass, with all that arguments, files, flags and documentation need to know of each."""

from __future__ import annotations

import difflib
import inspect
import os
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, wraps
from types import NoneType, UnionType
from typing import (
    Any,
    Concatenate,
    Generic,
    NamedTuple,
    ParamSpec,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

from llm_infer.base.errors import UserError
from llm_infer.base.plain_values import plain

P = ParamSpec("P")
S = TypeVar("S")
R = TypeVar("R")
O = TypeVar("O")  # noqa: E741


class Setting(NamedTuple):
    """One setting.

    Attributes:
        name: the argument's; with dashes for underscores that of the flag and of the key in files.
        kinds: types of its values; `NoneType` is among them where it may be left open.
        default: its value where nobody sets it.
        help: what it means. The first sentence has at most 60 characters and stands in overviews.
        choices: its only values, if it has few.
        aliases: other names.
        short: a short flag, or "".
        of_process: processes of several hosts may differ in it.
    """

    name: str
    kinds: tuple[type, ...]
    default: Any
    help: str
    choices: tuple[str, ...]
    aliases: tuple[str, ...]
    short: str
    of_process: bool

    @property
    def summary(self) -> str:
        """The first sentence of `help`."""
        return self.help.partition(". ")[0].removesuffix(".") + "."

    def checked(self, value: Any) -> Any:
        """Returns the value as one of Python's own types.

        Raises:
            UserError: it has another type than the setting, or is not one of `choices`.
        """
        value = plain(value)
        if not any(_is(value, kind) for kind in self.kinds):
            words = " or ".join(_WORDS[kind] for kind in self.kinds if kind is not NoneType)
            raise UserError(f"{self.name}={value!r:.60}: expected {words}")
        if self.choices and value not in self.choices:
            raise UserError(f"{self.name}={value!r:.60}: expected one of {', '.join(self.choices)}")
        return value


_WORDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    os.PathLike: "a path",
    Mapping: "a mapping of names to values",
}


def _is(value: object, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return kind is bool and isinstance(value, bool)
    return isinstance(value, int | float if kind is float else kind)


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    short: str = "",
    of_process: bool = False,
) -> Any:
    """Declares a field of a dataclass as a `Setting`."""
    facts = {"help": help, "choices": choices, "aliases": aliases, "short": short, "of_process": of_process}
    return field(default=default, metadata=facts)


@cache
def settings_of(kind: type) -> dict[str, Setting]:
    """Returns the settings that a dataclass declares, by name."""
    hints, found = get_type_hints(kind), {}
    for each in fields(kind):
        hint = hints[each.name]
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        kinds = tuple(get_origin(one) or one for one in kinds)
        found[each.name] = Setting(name=each.name, kinds=kinds, default=each.default, **each.metadata)
    return found


def by_name(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values by the names of their settings; they may be given by an alias, and with dashes.

    Raises:
        UserError: a name is not known, and the message has the nearest one; or a setting is given twice.
    """
    known = settings_of(kind)
    names = {name: setting.name for setting in known.values() for name in (setting.name, *setting.aliases)}
    result: dict[str, Any] = {}
    for given, value in values.items():
        plain_name = given.replace("-", "_")
        if plain_name not in names:
            near = difflib.get_close_matches(plain_name, names, n=1)
            shown = near[0].replace("_", "-") if near and "-" in given else "".join(near)
            hint = f"did you mean {shown}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"{given!r} is no setting: {hint}")
        if names[plain_name] in result:
            raise UserError(f"{names[plain_name]} is set twice, the second time as {given!r}")
        result[names[plain_name]] = value
    return result


def from_arguments(kind: Callable[..., O], arguments: tuple[Any, ...], named: Mapping[str, Any]) -> O:
    """Makes a dataclass of settings from a call's arguments, under any of their names.

    Raises:
        UserError: see `by_name`, or there are more arguments without a name than the class takes.
    """
    assert isinstance(kind, type)
    free = [each.name for each in fields(kind) if not each.kw_only]
    if len(arguments) > len(free):
        raise UserError(f"only {', '.join(free)} can be given without a name: {arguments[len(free)]!r:.60} needs one")
    first = dict(zip(free, arguments, strict=False))
    result = by_name(kind, named)
    if twice := first.keys() & result.keys():
        raise UserError(f"{', '.join(twice)} is set twice, once without its name")
    return kind(**first, **result)


@dataclass(frozen=True)
class Takes(Generic[P, O]):
    """Has a function whose last argument is a dataclass of settings be called with the settings themselves.

    They may have any of their names. The signature shows all of them, to type checkers, too.
    """

    kind: Callable[P, O]

    @overload
    def __call__(self, function: Callable[[O], R]) -> Callable[P, R]: ...

    @overload
    def __call__(self, function: Callable[[S, O], R]) -> Callable[Concatenate[S, P], R]: ...

    def __call__(self, function: Callable[..., R]) -> Callable[..., R]:
        *own, _ = inspect.signature(function).parameters.values()
        assert len(own) <= 1, "a function, or a method with its object"

        @wraps(function)
        def call(*arguments: Any, **named: Any) -> R:
            given = from_arguments(self.kind, arguments[len(own) :], named)
            return function(*arguments[: len(own)], given)

        shown = inspect.signature(self.kind, eval_str=True)
        both = [*own, *shown.parameters.values()]
        call.__signature__ = shown.replace(  # type: ignore[attr-defined]
            parameters=both, return_annotation=inspect.signature(function, eval_str=True).return_annotation
        )
        return call


def document(target: Any, kind: type) -> None:
    """Puts the settings of a dataclass with their meanings in the place of a line SETTINGS in a docstring."""
    text = inspect.cleandoc(target.__doc__ or "")
    assert "    SETTINGS\n" in text, f"where the settings of {target.__name__} go"
    target.__doc__ = text.replace("    SETTINGS", listed(kind, indent=4))


def listed(kind: type, *, indent: int) -> str:
    """Returns the settings with their meanings as lines for the section "Args" of a docstring."""
    lines = []
    for each in settings_of(kind).values():
        also = f" Also: {', '.join(each.aliases)}." if each.aliases else ""
        lines += textwrap.wrap(
            f"{each.name}: {each.help}{also}", 118 - indent, subsequent_indent="    ", break_on_hyphens=False
        )
    return textwrap.indent("\n".join(lines), " " * indent)
