"""Compiles structured output with llguidance into token masks; whatever goes wrong forbids tokens, it never allows them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_infer.base.errors import RequestError, UserError
from llm_infer.decoding.structured import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

COMPILE_SECONDS = 10.0
"""Longest wait for one grammar."""

JSON_FORM: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrbtf\\"',
}
"""One way to write each value: free white space would let a model fill its tokens with it, and a key written with
\\u escapes would pass for another than the one that a schema names."""

FAULT = "a fault of llguidance"
"""Words for a panic inside the library, as users read them."""

_PANIC = "panicked at"


class GrammarCompiler:
    """Compiles grammars for one tokenizer, on a thread of its own.

    Args:
        token_bytes: exact bytes of each token of the model's vocabulary, by id.
        special_ids: tokens that are markers and not text; no grammar produces them.
        eos_ids: tokens that end an output; allowed where it is complete.
        encode: text tokens that have exactly the bytes of a text.

    Raises:
        UserError: llguidance is not installed, or there is no token to end an output with.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        special_ids: Sequence[int],
        eos_ids: Sequence[int],
        encode: Callable[[str], list[int]],
    ) -> None:
        try:
            import llguidance
        except ModuleNotFoundError:
            raise UserError("structured output needs llguidance: pip install 'llm-infer[structured]'") from None
        if not eos_ids:
            raise UserError("structured output needs a model whose tokenizer names an end-of-sequence token")
        self._library = llguidance
        vocabulary = _Vocabulary(token_bytes, special_ids, eos_ids, encode)
        wrapper = llguidance.TokenizerWrapper(vocabulary)
        self._tokenizer = llguidance.LLTokenizer(wrapper, n_vocab=len(token_bytes), eos_token=list(eos_ids))
        # Fuel limits of the library bound a compilation that goes on after its request has given up on it.
        self._limits = llguidance.LLParserLimits(max_grammar_size=100_000, max_lexer_states=50_000)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    def compile(self, params: StructuredOutputsParams, seconds: float = COMPILE_SECONDS) -> CompiledGrammar:
        """Compiles the grammar of a request; other threads run meanwhile.

        Raises:
            RequestError: the grammar is malformed, asks for something unsupported, can be satisfied by nothing, or takes too
                long.
        """
        where = f"structured_outputs.{params.kind}"
        try:
            matcher = self._pool.submit(self._compile, params).result(timeout=seconds)
        except FutureTimeout:
            # The thread may stay busy for a while: later requests get another.
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")
            raise RequestError(f"{where} did not compile within {seconds:g} s: simplify it") from None
        except ValueError as error:
            raise _failure(where, str(error)) from None
        except BaseException as error:
            _check_panic(error)
            raise _failure(where, FAULT) from None
        if matcher.is_error():
            raise _failure(where, _gist(matcher.get_error()))
        if warnings := matcher.get_grammar_warnings():
            raise RequestError(f"{where} asks for something that would be ignored: {_gist(str(warnings[0]))}")
        grammar = CompiledGrammar(matcher)
        why = grammar.matcher().fill([], np.zeros(-(-self._tokenizer.vocab_size // 32), np.int32))
        if why is not None:
            raise _failure(where, FAULT if FAULT in why else "nothing satisfies it")
        return grammar

    def _compile(self, params: StructuredOutputsParams) -> Any:
        library = self._library.LLMatcher
        if params.json is not None or params.json_object:
            schema = params.json or '{"type": "object"}'
            assert isinstance(schema, str), "kept as text"
            text = library.grammar_from_json_schema(schema, overrides=JSON_FORM)
        elif params.regex is not None:
            text = library.grammar_from_regex(params.regex)
        elif params.choice is not None:
            # A terminal: the parser's rows hold at most 2000 alternatives, the lexer's states any number.
            text = library.grammar_from_lark("start: TEXT\nTEXT: " + " | ".join(map(json.dumps, params.choice)))
        else:
            assert params.grammar is not None, "one of them is given"
            text = library.grammar_from_lark(params.grammar)
        return library(self._tokenizer, text, log_level=0, limits=self._limits)


class CompiledGrammar:
    """A grammar at its start; sequences take copies."""

    def __init__(self, start: Any) -> None:
        self._start = start

    def matcher(self) -> GrammarMatcher:
        """Returns a matcher for a sequence that starts."""
        return GrammarMatcher(self._start.deep_copy())


class GrammarMatcher:
    """One sequence's progress through a grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self._consumed = 0

    def fill(self, output: Sequence[int], mask: np.ndarray) -> str | None:
        """Writes the tokens that may follow `output` into `mask` [W] int32; if there are none or a limit is hit, says why."""
        matcher = self._matcher
        new = list(output[self._consumed :])
        self._consumed = len(output)
        try:
            if not new or matcher.consume_tokens(new):
                matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
                if not matcher.is_error() and mask.any():
                    return None
            why = _gist(matcher.get_error()) if matcher.is_error() else "no token of the model continues it"
        except BaseException as error:
            _check_panic(error)
            why = FAULT
        return f"structured_outputs could not go on at token {len(output) + 1} ({why}): simplify it"


class _Vocabulary:
    """A tokenizer as llguidance wants to see it."""

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        special_ids: Sequence[int],
        eos_ids: Sequence[int],
        encode: Callable[[str], list[int]],
    ) -> None:
        self.tokens = list(token_bytes)
        self.special_token_ids = sorted({*special_ids, *eos_ids})
        self.eos_token_id, self.bos_token_id = eos_ids[0], None
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8"))


def _gist(text: str) -> str:
    """Returns the first line and, where that only announces an error (of a regular expression), the line that says it."""
    if _PANIC in text:
        return FAULT
    first, *others = text.strip().splitlines()
    return " ".join([first[:300], *(line.strip()[:300] for line in others if line.startswith("error:"))])


def _failure(where: str, why: str) -> RequestError:
    fault = why == FAULT or _PANIC in why
    return RequestError(f"{where} could not be compiled ({FAULT}): simplify it" if fault else f"{where}: {why}")


def _check_panic(error: BaseException) -> None:
    """Raises all but a panic of the library, which is no Exception and has no class to import."""
    if type(error).__name__ != "PanicException":
        raise error
