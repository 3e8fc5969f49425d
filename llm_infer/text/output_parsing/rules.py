"""How calls can be written: the rules that rows of the table of formats are made of."""

from __future__ import annotations

import re
import secrets
import string
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class JsonCalls:
    """Calls that are JSON objects with a name and arguments.

    Attributes:
        arguments: the key that holds the arguments where calls are forced; the others of `ARGUMENT_KEYS` are read, too.
        listed: whether calls are forced as a list; read are single objects and lists in any case.
        separator: what stands between objects outside a list.
    """

    arguments: str = "arguments"
    listed: bool = False
    separator: str = ""


@dataclass(frozen=True, slots=True)
class NamedJson:
    """Calls that write the name, then the arguments as a JSON object.

    Attributes:
        before, middle, after: what stands before the name, between name and arguments, and after these. White space around
            them may vary where it is read.
        separator: what stands between calls.
        prefix, numbered: what the name starts with, and whether `:` and the call's number follow it.
        id_mark: what stands between the name and an id of nine letters and digits, if the model writes one.
        tight: whether `middle` may be missing.
        or_json: whether `JsonCalls` are read as well.
    """

    before: str
    middle: str
    after: str
    separator: str = ""
    prefix: str = ""
    numbered: bool = False
    id_mark: str = ""
    tight: bool = False
    or_json: bool = False


@dataclass(frozen=True, slots=True)
class Tagged:
    """Calls that write each argument between tags, as bare text.

    Attributes:
        before, middle, after: what stands before the function's name, after it, and after the arguments.
        key, value: what stands before a parameter's name, and between it and the value.
        json_value: what stands there instead if the value is JSON, where the format tells the two apart.
        end: what stands after the value.
        padding: white space that is no part of a value, at either side of it.
        separator: what stands between calls.
    """

    before: str
    middle: str
    after: str
    key: str
    value: str
    end: str
    json_value: str | None = None
    padding: str = ""
    separator: str = ""


@dataclass(frozen=True, slots=True)
class Pythonic:
    """Calls that are Python expressions with keyword arguments: `[f(a=1), g()]`, or one a line without brackets."""

    listed: bool = True


@dataclass(frozen=True, slots=True)
class Harmony:
    """Messages with headers that name a channel and a recipient; a call is a message to `functions.NAME`."""


Rule = JsonCalls | NamedJson | Tagged | Pythonic | Harmony


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """How a family writes tool calls: `start`, calls by `rule`, `end`.

    Attributes:
        name, aliases: values of `--tool-call-parser`.
        start, end: what opens and closes calls; without `start` they are known by their form, at the beginning of the answer.
        optional_start: whether `start` may be missing.
        rule: the form of the calls between them.
        gap: what stands between `start`, calls and `end` where calls are forced.
        each: what stands between sections where each call has a `start` and `end` of its own; None for one pair around all.
        ids: how calls get their ids: "call" (`call_` and 24 hexadecimal digits), "nine" (nine letters and digits), "number" (the
            text that names the function and counts the call).
        signs, others: a chat template for this format has all of the first and none of the second.
    """

    name: str
    rule: Rule
    aliases: tuple[str, ...] = ()
    start: str = ""
    end: str = ""
    optional_start: bool = False
    gap: str = ""
    each: str | None = None
    ids: str = "call"
    signs: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def bare(self) -> bool:
        """Whether calls may begin without a marker."""
        return not isinstance(self.rule, Harmony) and (not self.start or self.optional_start)

    @property
    def markers(self) -> tuple[str, ...]:
        """The texts that may be special tokens of a model; where they are, its output is to be read with special tokens."""
        if isinstance(self.rule, Harmony):
            return HARMONY_MARKERS
        found = [self.start, self.end]
        if isinstance(self.rule, NamedJson | Tagged):
            found += [self.rule.before, self.rule.middle, self.rule.after]
        if isinstance(self.rule, NamedJson):
            found.append(self.rule.id_mark)
        if isinstance(self.rule, Tagged):
            found += [self.rule.key, self.rule.value, self.rule.end]
        return tuple(dict.fromkeys(part for text in found for part in _MARKER.findall(text)))

    def new_id(self) -> str:
        """Returns an id that no other call has."""
        if self.ids == "nine":
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
        return "call_" + secrets.token_hex(12)


ARGUMENT_KEYS = ("arguments", "parameters")
"""Keys of a call that is an object under which its arguments are looked for."""

HARMONY_MARKERS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>")

_MARKER = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")
