"""`llm-infer chat`: a conversation in the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_infer.base.errors import UserError
from llm_infer.base.outputs import StreamChunk
from llm_infer.commands.answers import answer, show_answer
from llm_infer.commands.command import with_flags
from llm_infer.commands.interactive import Messages, for_requests, interactive_llm, read_conversation
from llm_infer.commands.line_input import LineInput
from llm_infer.commands.options import ONE_USER, Quiet, System, Threads, Verbose, takes_engine_options
from llm_infer.commands.sampling import CHAT_TOKENS, FLAGS, sampling_params
from llm_infer.options import EngineOptions

if TYPE_CHECKING:
    from llm_infer.decoding.sampling_params import SamplingParams
    from llm_infer.llm import LLM

HELP = """\
/help          shows this
/system TEXT   sets the system message; without a text shows it
/clear         starts a new conversation, with the same system message
/regen         answers the last question again
/save FILE     writes the conversation as JSON
/load FILE     goes on with a conversation that was saved
/exit          leaves, as Ctrl-D does
\"\"\"            begins and ends text of several lines; or end lines in \\
Ctrl-C         stops an answer"""


@takes_engine_options(**ONE_USER)
@with_flags(FLAGS, before="threads", max_tokens=CHAT_TOKENS)
def chat(
    system: System = None,
    prompt_file: Annotated[
        str | None, typer.Option("--prompt-file", "-f", metavar="FILE", help="Go on with a conversation of /save.")
    ] = None,
    threads: Threads = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    *,
    options: EngineOptions,
    **sampling: Any,
) -> None:
    """Talks with the model, turn by turn.

    Ctrl-C stops an answer, /help lists commands, Ctrl-D or /exit leaves.
    """
    params = sampling_params(sampling)
    messages = [] if prompt_file is None else read_conversation(prompt_file, "--prompt-file")
    llm = interactive_llm(for_requests(options, params, quiet=quiet))
    conversation = Conversation(llm, params, messages, verbose=verbose)
    if system is not None:
        conversation.system(system)
    conversation.check()  # a model without a template fails here, not later
    if not quiet:
        print("Ctrl-C stops an answer, /help lists commands, /exit or Ctrl-D leaves.", file=sys.stderr)
    with LineInput() as lines:
        while (text := lines.read()) is not None and conversation.take(text):
            pass


class Conversation:
    """A conversation and what its user may do with it.

    Attributes:
        messages: in OpenAI form; a system message stands first.
    """

    def __init__(self, llm: LLM, params: SamplingParams, messages: Messages, *, verbose: bool = False) -> None:
        self._llm, self._params, self._verbose = llm, params, verbose
        self.messages = messages

    def check(self) -> None:
        """Raises UserError if the model has no chat template, or one that does not take these messages."""
        self._llm.chat_prompt([*self._system(), {"role": "user", "content": "hello"}])

    def take(self, text: str) -> bool:
        """Does what a line asks for: a command, or a question to answer. Returns False if it was to leave."""
        command, _, rest = text.strip().partition(" ")
        rest = rest.strip()
        try:
            match command:
                case "":
                    pass
                case "/exit" | "/quit" | "/bye":
                    return False
                case "/help" | "/?":
                    print(HELP, file=sys.stderr)
                case "/clear" | "/reset":
                    self.messages = self._system()
                    print("(a new conversation)", file=sys.stderr)
                case "/system":
                    self.system(rest)
                case "/save":
                    self.save(rest)
                case "/load":
                    self.messages = read_conversation(_file(rest, command), command)
                    print(f"({len(self.messages)} messages)", file=sys.stderr)
                case "/regen":
                    self.answer_again()
                case _ if command.startswith("/") and "\n" not in text:
                    print(f"unknown command {command}: /help lists commands, /exit leaves", file=sys.stderr)
                case _:
                    self.ask(text.strip())
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        return True

    def system(self, text: str) -> None:
        """Sets the system message; shows it if the text is empty."""
        if text:
            self.messages = [{"role": "system", "content": text}, *self.messages[len(self._system()) :]]
            return
        shown = self._system()
        print(f"system: {shown[0]['content']}" if shown else "no system message", file=sys.stderr)

    def save(self, file: str) -> None:
        """Writes the conversation as JSON."""
        try:
            with open(_file(file, "/save"), "w", encoding="utf-8") as stream:
                json.dump(self.messages, stream, ensure_ascii=False, indent=2)
                stream.write("\n")
            print(f"({len(self.messages)} messages in {file})", file=sys.stderr)
        except OSError as error:
            raise UserError(f"/save {file}: {error.strerror}") from None
        except ValueError as error:  # a name with a zero byte, half of a surrogate pair in a message
            raise UserError(f"/save {file}: {error}") from None

    def answer_again(self) -> None:
        """Answers the last question again."""
        questions = [at for at, message in enumerate(self.messages) if message["role"] == "user"]
        if not questions:
            raise UserError("nothing was asked yet")
        question = self.messages[questions[-1]]
        self.messages = self.messages[: questions[-1]]
        self.ask(question["content"])

    def ask(self, text: str) -> None:
        """Streams the answer to a question; if it does not fit, the conversation stays as it was."""
        asked = [*self.messages, {"role": "user", "content": text}]
        said: list[str] = []
        try:
            stream = answer(self._llm, self._llm.chat_prompt(asked), self._params)
            try:
                show_answer(_keeping(stream, said), self._params, verbose=self._verbose)
            finally:
                stream.close()  # type: ignore[attr-defined]
        except KeyboardInterrupt:
            print("(stopped)", file=sys.stderr)
        except UserError as error:
            raise UserError(f"{error} (/clear starts a new conversation)") from None
        self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]

    def _system(self) -> Messages:
        return self.messages[:1] if self.messages and self.messages[0]["role"] == "system" else []


def _keeping(chunks: Iterable[StreamChunk], texts: list[str]) -> Iterator[StreamChunk]:
    """Yields the chunks, and keeps their texts: Ctrl-C leaves what has been said."""
    for chunk in chunks:
        texts.append(chunk.text)
        yield chunk


def _file(name: str, command: str) -> str:
    if not name:
        raise UserError(f"{command} needs the name of a file")
    return name
