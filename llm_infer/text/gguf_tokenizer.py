"""Rebuilds a tokenizer from GGUF metadata so that it gives the ids that llama.cpp gives for the same file.

Source of the rules: the GGUF specification (`tokenizer.ggml.*`), the split patterns that the models publish in their
`tokenizer.json`, and llama.cpp's observed ids (tests/goldens/tokenizer_llamacpp.json).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llm_infer.base.errors import ModelError
from llm_infer.text.pre_tokenizers import PRE_TOKENIZERS

_CONTROL, _UNKNOWN, _USER_DEFINED = 3, 2, 4  # tokenizer.ggml.token_type values that are matched in raw text

_END_OF_GENERATION = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
    *("<end_of_utterance>", "<｜end▁of▁sentence｜>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
)
"""Texts of tokens that end an answer although `eos_token_id` may name another token; llama.cpp knows the same ones."""

_END_OF_GENERATION_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """A tokenizer as GGUF metadata describes it.

    Attributes:
        backend: encodes text; its ids at or above `vocab_size` are stand-ins, see `stand_ins`.
        vocab_size: number of tokens in the file.
        stand_ins: backend id → real ids. A character without a token must still keep its neighbours from merging,
            as it does in llama.cpp, so it gets an id of its own here; it is replaced by its byte tokens, or by nothing.
        bos_token_id: beginning-of-sequence token, if any.
        eos_token_id: the token that the file names as end of sequence, if any.
        eos_token_ids: every token that ends generation.
        chat_templates: name → Jinja source; "default" is the usual one.
    """

    backend: Tokenizer
    vocab_size: int
    stand_ins: Mapping[int, tuple[int, ...]]
    bos_token_id: int | None
    eos_token_id: int | None
    eos_token_ids: frozenset[int]
    chat_templates: Mapping[str, str] = field(default_factory=dict)


def rebuild_tokenizer(metadata: Mapping[str, object]) -> GgufTokenizer:
    """Builds the tokenizer that `metadata` (GGUF key → value; arrays as lists or numpy arrays) describes.

    Raises:
        ModelError: the tokenizer model or pre-tokenizer is not supported, or the metadata contradicts itself.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        found = "no tokenizer.ggml.model" if model is None else f"tokenizer.ggml.model = {model!r}"
        raise ModelError(f"the GGUF file has {found}: supported are 'gpt2' (BPE) and 'llama' (SentencePiece)")
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(_strings(metadata, "tokenizer.ggml.tokens"))]
    vocab = {text: i for i, text in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(text for i, text in enumerate(tokens) if vocab[text] != i)
        raise ModelError(
            f"tokenizer.ggml.tokens names {twice!r} twice: every token has one id; convert the model again"
        )
    if model == "gpt2":
        backend, stand_ins, add_bos = _byte_level_bpe(metadata, vocab)
        defaults: dict[str, int] = {}
    else:
        backend, stand_ins = _sentencepiece(metadata, vocab, tokens)
        add_bos, defaults = True, {"bos": 1, "eos": 2, "unknown": 0}

    named = {name: _token_id(metadata, name, tokens, defaults) for name in ("bos", *_END_OF_GENERATION_KEYS)}
    known_ends = {vocab[text] for text in _END_OF_GENERATION if text in vocab}
    eos_ids = known_ends | {i for name, i in named.items() if i is not None and name != "bos"}
    if {"<|return|>", "<|call|>"} <= vocab.keys() or {"<|calls|>", "<|flush|>"} <= vocab.keys():
        eos_ids.discard(vocab.get("<|end|>", -1))  # in such models it ends a channel, not the answer

    _add_special_tokens(backend, metadata, tokens, known_ends)
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    for wanted, name in ((add_bos, "bos"), (add_eos, "eos")):
        if wanted and named[name] is None:
            raise ModelError(f"tokenizer.ggml.add_{name}_token is true but tokenizer.ggml.{name}_token_id is missing")
    _frame_sequence(backend, named["bos"] if add_bos else None, named["eos"] if add_eos else None)

    templates = {
        key.removeprefix("tokenizer.chat_template").removeprefix(".") or "default": str(source)
        for key, source in metadata.items()
        if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template.")
    }
    return GgufTokenizer(backend, len(tokens), stand_ins, named["bos"], named["eos"], frozenset(eos_ids), templates)


def _frame_sequence(backend: Tokenizer, bos_token_id: int | None, eos_token_id: int | None) -> None:
    """Makes `backend` put these tokens before and after a text when special tokens are asked for; None stands for no token."""
    special = [(name, i) for name, i in (("bos", bos_token_id), ("eos", eos_token_id)) if i is not None]
    names = [name for name, _ in special]
    single = (["bos"] if "bos" in names else []) + ["$A"] + (["eos"] if "eos" in names else [])
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)


def byte_alphabet() -> dict[str, int]:
    """Returns the byte of each character of byte-level vocabularies: printable Latin-1 is itself, the rest moves to U+0100….

    Source: GPT-2's published encoder.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(moved)}


def _byte_level_bpe(
    metadata: Mapping[str, object], vocab: Mapping[str, int]
) -> tuple[Tokenizer, dict[int, tuple[int, ...]], bool]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    rule = PRE_TOKENIZERS.get(str(name))
    if rule is None:
        supported = ", ".join(sorted(PRE_TOKENIZERS))
        raise ModelError(f"tokenizer.ggml.pre = {name!r} is not supported: supported are {supported}")
    merges = []
    for i, text in enumerate(_strings(metadata, "tokenizer.ggml.merges")):
        left, _, right = text.partition(" ")
        if left + right not in vocab or not right:
            raise ModelError(f"tokenizer.ggml.merges[{i}] = {text!r} does not make a token of the vocabulary")
        merges.append((left, right))
    missing = [char for char in byte_alphabet() if char not in vocab]
    stand_ins = {len(vocab) + n: () for n in range(len(missing))}
    alphabet = {char: len(vocab) + n for n, char in enumerate(missing)}
    backend = Tokenizer(models.BPE(vocab={**vocab, **alphabet}, merges=merges, ignore_merges=rule.ignore_merges))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.splits]
    encode_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, encode_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend, stand_ins, rule.add_bos


def _sentencepiece(
    metadata: Mapping[str, object], vocab: Mapping[str, int], tokens: Sequence[str]
) -> tuple[Tokenizer, dict[int, tuple[int, ...]]]:
    scores = _numbers(metadata, "tokenizer.ggml.scores", len(tokens))
    byte_tokens = [vocab.get(f"<0x{b:02X}>") for b in range(256)]
    if None in byte_tokens:
        raise ModelError("tokenizer.ggml.tokens lacks byte tokens: a SentencePiece vocabulary needs <0x00> … <0xFF>")
    # A piece may hold a character that is not itself a token; SentencePiece merges it all the same.
    missing = sorted({char for text in tokens if len(text) > 1 for char in text} - vocab.keys())
    alphabet = {char: len(vocab) + n for n, char in enumerate(missing)}
    stand_ins = {i: tuple(byte_tokens[b] or 0 for b in char.encode()) for char, i in alphabet.items()}
    everything = {**vocab, **alphabet}
    # Every way to cut a piece in two known parts is a merge; the piece with the best score comes first. Among cuts of
    # one piece the leftmost place in the text should win; that matters for runs of one character, and
    # there the longer part stands on the left.
    merges = [
        (-scores[i], i, -cut, text[:cut], text[cut:])
        for text, i in vocab.items()
        for cut in range(1, len(text))
        if text[:cut] in everything and text[cut:] in everything
    ]
    merges.sort()
    model = models.BPE(vocab=everything, merges=[merge[3:] for merge in merges], byte_fallback=True, fuse_unk=False)
    backend = Tokenizer(model)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend, stand_ins


def _add_special_tokens(
    backend: Tokenizer, metadata: Mapping[str, object], tokens: Sequence[str], known_ends: set[int]
) -> None:
    types = _numbers(metadata, "tokenizer.ggml.token_type", len(tokens))
    # Phi-3's special tokens swallow the white space after them; GGUF has no field for that, so llama.cpp goes by the name.
    name = str(metadata.get("general.name", "")).lower()
    swallow = "phi-3" in name or "phi3" in name
    added = []
    for i, (text, kind) in enumerate(zip(tokens, types, strict=False)):
        if i in known_ends:
            kind = _CONTROL  # some converters forget to mark them
        if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED):
            rstrip = swallow and text not in ("<unk>", "<s>", "<|endoftext|>")
            added.append(AddedToken(text, special=kind != _USER_DEFINED, normalized=False, rstrip=rstrip))
    backend.add_special_tokens([token for token in added if token.special])
    backend.add_tokens([token for token in added if not token.special])


def _token_id(
    metadata: Mapping[str, object], name: str, tokens: Sequence[str], defaults: Mapping[str, int]
) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key, defaults.get(name))
    if value is None:
        return None
    if not 0 <= int(value) < len(tokens):  # pyright: ignore[reportArgumentType]
        raise ModelError(f"{key} = {value} is outside the vocabulary of {len(tokens)} tokens")
    return int(value)  # pyright: ignore[reportArgumentType]


def _strings(metadata: Mapping[str, object], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, Sequence) and not hasattr(value, "tolist"):
        raise ModelError(f"the GGUF file has no list {key}: take a file converted with its tokenizer")
    return [str(item) for item in value]  # pyright: ignore


def _numbers(metadata: Mapping[str, object], key: str, count: int) -> list[float]:
    value = metadata.get(key)
    if value is None:
        return [0.0] * count
    numbers = value.tolist() if hasattr(value, "tolist") else list(value)  # pyright: ignore
    if len(numbers) < count:
        raise ModelError(f"{key} has {len(numbers)} entries for {count} tokens")
    return numbers
