"""Reads the messages of gpt-oss: channels for reasoning and answers, recipients for calls."""

from __future__ import annotations

import re

from llm_infer.text.output_parsing.incoming import Incoming, NotACallError, Reading
from llm_infer.text.output_parsing.literals import read_value
from llm_infer.text.output_parsing.writer import Writer

_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=([^\s<]+)")
_FUNCTIONS = "functions."


def read_harmony(source: Incoming, writer: Writer, *, calls: bool) -> Reading[None]:
    """Reads an output up to its end; without `calls` those are part of the text."""
    opened = yield from source.skip_space()
    while (yield from source.peek()):
        if opened.strip() or (yield from source.skip("<|channel|>")):
            opened = opened.strip() or "<|channel|>"
        elif (yield from source.skip("<|start|>")) or (yield from source.peek(3)) == "to=":
            opened = "<|start|>"
        else:
            opened = yield from source.until(_ENDS, writer.text)
            opened = opened if opened in ("<|start|>", "<|channel|>") else ""
            continue
        head: list[str] = [opened]
        if not (yield from source.until(("<|message|>",), head.append)):
            return  # a header says nothing to the user
        opened = yield from _read_body(source, writer, "".join(head), calls)
        yield from source.skip_space()


def _read_body(source: Incoming, writer: Writer, header: str, calls: bool) -> Reading[str]:
    """Reads a message after its header; returns the marker that begins the next one, "" if another ended this one."""
    channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
    write = writer.text
    if recipient and recipient[1].startswith(_FUNCTIONS):
        if calls:
            source.start_record()
            try:
                writer.open_call(recipient[1].removeprefix(_FUNCTIONS))
                yield from source.skip_space()
                if (yield from source.peek()) != "{":
                    raise NotACallError

                def emit(text: str) -> None:
                    writer.arguments(text)
                    source.start_record()

                yield from read_value(source, emit)
                writer.close_call()
                source.recorded()
            except NotACallError:
                kept, rest = writer.drop_call(), source.recorded()
                if not (kept and source.ended):
                    writer.text(rest)
    elif recipient or (channel and channel[1] == "analysis"):
        write = writer.reasoning
        write("\n")
        writer.thinking = True
    else:
        writer.new_line()
    end = yield from source.until(_ENDS, write)
    if writer.thinking:
        writer.end_reasoning()
    return end if end in ("<|start|>", "<|channel|>") else ""
