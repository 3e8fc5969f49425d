"""A model's tokenizer: text to token ids and back, built from a Hugging Face directory or from GGUF metadata."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from llm_infer.base.errors import ModelError, RequestError
from llm_infer.text.backend_copies import copy_of
from llm_infer.text.control_tokens import ControlTokens
from llm_infer.text.gguf_tokenizer import byte_alphabet, rebuild_tokenizer
from llm_infer.text.hf_files import (
    SPECIAL_NAMES,
    guarded,
    read_json,
    read_template,
    special_texts,
    token_ids,
    token_text,
)


class Tokenizer:
    """Turns text into token ids and back, and knows the exact bytes of every token.

    Attributes:
        vocab_size: one more than the largest token id.
        bos_token_id: beginning-of-sequence token, if the model has one.
        eos_token_id: the token that the model names as end of sequence, if any; templates use its text.
        eos_token_ids: every token that ends generation (end of sequence, end of turn, …).
        special_tokens: text → id of the tokens that are markers and not text.
        chat_templates: name → Jinja source; "default" is the usual one.
        strips_leading_space: whether a decoded text loses one leading space (SentencePiece adds one when it encodes).
        has_text: whether ids have texts; False for the stand-in of a model without a tokenizer.
    """

    has_text = True

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        eos_token_ids: Iterable[int] = (),
        chat_templates: Mapping[str, str] | None = None,
        vocab_size: int | None = None,
        stand_ins: Mapping[int, tuple[int, ...]] | None = None,
    ) -> None:
        """Wraps `backend`; `vocab_size` and `stand_ins` are described in `gguf_tokenizer.GgufTokenizer`.

        Raises:
            ModelError: the decoder of `backend` is of a kind whose tokens have no bytes of their own.
        """
        self._backend = backend
        self._copies: dict[tuple[bool, bool], tokenizers.Tokenizer] = {(True, True): backend}
        self._byte_level, self.strips_leading_space = _decoder_kind(backend)
        self._alphabet = byte_alphabet()
        self._added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self._stand_ins = dict(stand_ins or {})
        self._bytes: dict[int, bytes] = {}
        if vocab_size is None:
            vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.vocab_size = vocab_size
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.eos_token_ids = frozenset(eos_token_ids)
        self.special_tokens: Mapping[str, int] = {self._added[i].content: i for i in sorted(self._special_ids)}
        self.chat_templates: Mapping[str, str] = dict(chat_templates or {})

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the default chat template, None for a model without one."""
        return self.chat_templates.get("default")

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """Builds the tokenizer that a GGUF file carries; `metadata`: key → value, arrays as lists or numpy arrays.

        Raises:
            ModelError: see `gguf_tokenizer.rebuild_tokenizer`.
        """
        parts = guarded(lambda: rebuild_tokenizer(metadata), "the GGUF file's tokenizer cannot be built")
        return cls(
            parts.backend,
            bos_token_id=parts.bos_token_id,
            eos_token_id=parts.eos_token_id,
            eos_token_ids=parts.eos_token_ids,
            chat_templates=parts.chat_templates,
            vocab_size=parts.vocab_size,
            stand_ins=parts.stand_ins,
        )

    @classmethod
    def from_hf_directory(cls, path: str | Path) -> Tokenizer:
        """Reads `tokenizer.json` and, where present, the configuration files beside it.

        The end-of-sequence ids are the union of those in generation_config.json, config.json and tokenizer_config.json.
        Which tokens go around a text is decided by tokenizer.json; `add_bos_token` beside it is ignored, as in transformers 5.

        Raises:
            ModelError: a file is missing, is not valid, or names a token that does not exist.
        """
        directory = Path(path)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise ModelError(
                f"{directory} has no tokenizer.json: expected a Hugging Face model directory with a fast tokenizer "
                "(transformers writes one with AutoTokenizer.from_pretrained(…).save_pretrained(…))"
            )
        problem = f"{file} is not a tokenizer this version of `tokenizers` can read"
        backend = guarded(lambda: tokenizers.Tokenizer.from_file(str(file)), problem)
        backend.no_truncation()
        backend.no_padding()
        config = read_json(directory / "special_tokens_map.json") | read_json(directory / "tokenizer_config.json")
        named = {name: token_text(config, f"{name}_token") for name in SPECIAL_NAMES}
        known = backend.get_vocab(with_added_tokens=True)
        for name in ("bos", "eos"):
            if (text := named[name]) is not None and text not in known:
                raise ModelError(
                    f"{directory}: tokenizer_config.json names {name}_token={text!r:.60}, which tokenizer.json does not "
                    "have: correct it, or set it to null"
                )
        _mark_special(backend, {*filter(None, named.values()), *special_texts(config)} & known.keys())
        ids = {name: None if text is None else backend.token_to_id(text) for name, text in named.items()}

        eos_ids = set() if ids["eos"] is None else {ids["eos"]}
        model = read_json(directory / "config.json")
        size = model.get("vocab_size")
        size = max(1 + max(known.values(), default=-1), size if type(size) is int else 0)
        for name in ("config.json", "generation_config.json"):
            found = model if name == "config.json" else read_json(directory / name)
            eos_ids.update(token_ids(directory / name, found, "eos_token_id", size))
            bos = token_ids(directory / name, found, "bos_token_id", size)
            if ids["bos"] is None and bos:
                ids["bos"] = bos[0]
        result = cls(
            backend,
            bos_token_id=ids["bos"],
            eos_token_id=ids["eos"] if ids["eos"] is not None else min(eos_ids, default=None),
            eos_token_ids=eos_ids,
            chat_templates=_hf_chat_templates(directory, config),
        )
        result.encode("A text, 1 é")  # many faults of a tokenizer show only when it is used
        return result

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True, begins: bool = True
    ) -> list[int]:
        """Returns the token ids of `text`.

        Args:
            text: any text.
            add_special_tokens: add the tokens the model wants around a sequence (beginning of sequence, …). Pass False
                for the output of a chat template, which has them already.
            parse_special: take the text of a special token, such as `<|im_end|>`, for that token, not for plain text.
            begins: whether `text` begins a whole text. One that continues another does not get the space that SentencePiece
                puts before a text.

        Raises:
            RequestError: the text holds half a surrogate pair, so it has no UTF-8 form.
        """
        _require_unicode(text)
        encoder = self._encoder(parse_special, begins)
        found = guarded(
            lambda: encoder.encode(text, add_special_tokens=add_special_tokens),
            "the model's tokenizer is damaged or inconsistent, it cannot encode a text",
        )
        ids = found.ids
        if not parse_special and not self._special_ids.isdisjoint(ids):
            kept = zip(ids, found.special_tokens_mask, strict=True)  # the mask is 1 where one was put around the text
            ids = [one for i, around in kept for one in ([i] if around else self._as_text(i))]
        if self._stand_ins and ids and max(ids) >= self.vocab_size:
            return [real for i in ids for real in self._stand_ins.get(i, (i,))]
        return ids

    def exact_tokens(self, text: str) -> list[int]:
        """Returns text tokens whose bytes are exactly those of `text`, as it would stand within a longer text.

        They are the usual tokens where these have those bytes. Where a tokenizer changes what it encodes (puts a space
        before it, normalises its characters), each token is the longest that fits.

        Raises:
            RequestError: `text` has a byte that no token has, or half a surrogate pair.
        """
        ids = self.encode(text, add_special_tokens=False, parse_special=False, begins=False)
        data = text.encode()
        return ids if b"".join(map(self.token_bytes, ids)) == data else self._spelled(data)

    def _as_text(self, token: int) -> list[int]:
        """Returns the token or, if it is special, the text tokens that spell it: pieces can merge to one."""
        return self._spelled(self.token_bytes(token)) if token in self._special_ids else [token]

    def _spelled(self, data: bytes) -> list[int]:
        """Returns the text tokens that have these bytes, each the longest that fits."""
        known, longest = self._ids_by_bytes
        ids, start = [], 0
        while start < len(data):
            ends = range(min(len(data), start + longest), start, -1)
            end = next((end for end in ends if data[start:end] in known), None)
            if end is None:
                raise RequestError(f"the model has no token for the byte 0x{data[start]:02X} in {data!r:.60}")
            ids.append(known[data[start:end]])
            start = end
        return ids

    def encode_literally(self, text: str, literal: Collection[int]) -> list[int]:
        """Returns the token ids of `text` as it is, in which no special token begins at a position in `literal`.

        Raises:
            RequestError: see `encode`.
        """
        _require_unicode(text)
        ids = self.control_tokens.encode(text, literal)
        return [real for i in ids for real in self._stand_ins.get(i, (i,))]

    @cached_property
    def control_tokens(self) -> ControlTokens:
        """The finder of special tokens' texts in contents."""
        return ControlTokens(self._backend, self.special_tokens, self._as_text)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary give nothing."""
        shown = (i for i in ids if not (skip_special_tokens and i in self._special_ids))
        data = b"".join(map(self.token_bytes, shown))
        if self.strips_leading_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the exact bytes of one token, possibly part of a character; empty for an id outside the vocabulary."""
        data = self._bytes.get(token_id)
        if data is None:
            data = self._bytes[token_id] = self._token_bytes(int(token_id))
        return data

    def is_special(self, token_id: int) -> bool:
        """Checks whether the token is a marker, which `decode` leaves out unless told otherwise."""
        return token_id in self._special_ids

    def token_id(self, text: str) -> int | None:
        """Returns the id of the token whose vocabulary entry is `text` (`<|im_end|>`, `Ġthe`, `▁the`), None if there is none."""
        found = self._backend.token_to_id(text)
        return found if found is not None and found < self.vocab_size else None

    def _token_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            return b""
        if token_id in self._added:
            return self._added[token_id].content.encode()
        text = self._backend.id_to_token(token_id)
        if text is None:
            return b""
        if not self._byte_level:
            if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                return bytes.fromhex(text[3:5])
            return text.replace("▁", " ").encode()
        if any(char not in self._alphabet for char in text):
            return text.encode()
        return bytes(self._alphabet[char] for char in text)

    def _encoder(self, parse_special: bool, begins: bool) -> tokenizers.Tokenizer:
        kind = (parse_special, begins)
        if kind not in self._copies:  # the difference is state of the backend, so another reading needs a copy
            self._copies[kind] = copy_of(self._backend, parse_special=parse_special, begins=begins)
        return self._copies[kind]

    @cached_property
    def _ids_by_bytes(self) -> tuple[dict[bytes, int], int]:
        """The id of each text token by its bytes, and the most bytes of one."""
        ids = {self.token_bytes(i): i for i in range(self.vocab_size - 1, -1, -1) if i not in self._special_ids}
        ids.pop(b"", None)
        return ids, max(map(len, ids), default=0)


def _mark_special(backend: tokenizers.Tokenizer, texts: set[str]) -> None:
    """Makes these tokens of the vocabulary special where tokenizer.json has not done so."""
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for text in sorted(texts):
        if text not in added:
            backend.add_special_tokens([text])
        elif not added[text].special:
            token = added[text]
            token.special = True
            backend.add_special_tokens([token])


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"lone surrogate U+{ord(text[error.start]):04X} at position {error.start}"
        raise RequestError(f"the text is not valid Unicode: {found}") from None


def _decoder_kind(backend: tokenizers.Tokenizer) -> tuple[bool, bool]:
    """Returns whether the alphabet is byte-level rather than SentencePiece's, and whether decoding strips one leading space."""
    state: dict[str, Any] = {} if backend.decoder is None else json.loads(backend.decoder.__getstate__())
    steps = state["decoders"] if state.get("type") == "Sequence" else [state]
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}:
        return True, False
    if kinds & {"Replace", "Metaspace"} and kinds <= {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}:
        prepends = any(step.get("prepend_scheme", "never") != "never" for step in steps)
        return False, prepends or "Strip" in kinds
    found = ", ".join(sorted(str(kind) for kind in kinds))
    raise ModelError(
        f"the tokenizer's decoder ({found}) is not supported: expected ByteLevel, or SentencePiece's Replace/Metaspace "
        "with ByteFallback, Fuse and Strip"
    )


def _hf_chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the templates of tokenizer_config.json, overruled by chat_template.jinja and additional_chat_templates/*.jinja."""
    entry = config.get("chat_template")
    listed = [{"name": "default", "template": entry}] if isinstance(entry, str) else [] if entry is None else entry
    templates: dict[str, str] = {}
    for each in listed if isinstance(listed, list) else [None]:
        name, source = (each.get("name"), each.get("template")) if isinstance(each, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(source, str):
            raise ModelError(
                f"{directory / 'tokenizer_config.json'}: chat_template={entry!r:.60}, expected a text, or a list of objects "
                "with a name and a template"
            )
        templates[name] = source
    file = directory / "chat_template.jinja"
    if file.is_file():
        templates["default"] = read_template(file)
    for extra in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[extra.stem] = read_template(extra)
    return templates
