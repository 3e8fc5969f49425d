"""Program of the process that renders chat templates: a Jinja sandbox in a loop of requests, under hard limits.

A chat template comes with a model or a request, and is a program. Jinja's sandbox keeps it from Python's internals; the
limits that this process sets on itself keep it from hanging the engine or filling its memory, whatever it computes.
Blocks, filters and globals are those of Hugging Face's templates (`raise_exception`, `strftime_now`, a `tojson` that
does not escape HTML, `{% generation %}`, `break`/`continue`).

It runs without the rest of `llm_infer`; `template_process.py` starts it and speaks with it.
"""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

HEADER = 8  # bytes before each message that hold its length, big-endian
MAX_OUTPUT = 1 << 24  # characters


class _GenerationBlock(Extension):
    """The block `{% generation %}…{% endgeneration %}`: it marks the assistant's words for training; here only its content
    counts."""

    tags = frozenset({"generation"})  # pyright: ignore[reportAssignmentType]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """A Jinja environment that refuses Python's internals and changes to arguments."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
        self.filters["tojson"] = _to_json
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        del self.globals["lipsum"]  # random filler

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """Raises the error of a forbidden attribute at once; Jinja would wait until it is used."""
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe")


def serve(cpu_seconds: float, memory: int) -> None:
    """Answers requests on file descriptor 0, a socket, until its other end closes.

    A request is JSON, `[template, variables]`. So is the answer: `["text", …]`, `["error", message]`, or
    `["spent", message]` from a process that should not be asked again. The kernel ends the process by SIGPROF when a
    request takes more than `cpu_seconds`, also within one long operation; `memory` bounds its address space in bytes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    with suppress(OSError, ValueError):  # systems without this limit are watched from outside
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(0, "rb") as reader, open(0, "wb", closefd=False) as writer:
        while header := reader.read(HEADER):
            request = reader.read(int.from_bytes(header, "big"))
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
            try:
                answer = json.dumps(_answer(request)).encode()
            except MemoryError:
                answer = json.dumps(["spent", _stopped(f"it takes more than {memory >> 20} MiB of memory")]).encode()
            signal.setitimer(signal.ITIMER_PROF, 0)
            writer.write(len(answer).to_bytes(HEADER, "big") + answer)
            writer.flush()


def _answer(request: bytes) -> list[str]:
    template, variables = json.loads(request)
    try:
        text = render(template, variables)
    except jinja2.TemplateSyntaxError as error:
        return ["error", f"the chat template is not valid Jinja, line {error.lineno}: {_one_line(error.message)}"]
    except SecurityError as error:
        return ["error", _stopped(_reason(error))]
    except jinja2.UndefinedError as error:
        return ["error", f"the chat template uses something these messages do not have: {_reason(error)}"]
    except jinja2.TemplateError as error:
        return ["error", f"the chat template refuses these messages: {_reason(error)}"]
    except MemoryError:
        raise
    except Exception as error:  # a template is somebody else's program: whatever it does wrong fails the request
        return ["error", f"the chat template failed with {type(error).__name__}: {_reason(error)}"]
    if len(text) > MAX_OUTPUT:
        return ["error", _stopped(f"it puts out more than {MAX_OUTPUT} characters")]
    return ["text", text]


def render(template: str, variables: Mapping[str, Any]) -> str:
    """Returns the text that a template makes of these variables; raises whatever goes wrong in it."""
    return _compiled(template).render(variables)


@lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    return TemplateSandbox().from_string(template)


def _stopped(why: str) -> str:
    return f"the chat template was stopped: {why}"


def _reason(error: BaseException) -> str:
    return _one_line(str(error)) or type(error).__name__


def _one_line(text: str | None) -> str:
    return " ".join((text or "")[:2000].split())


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
