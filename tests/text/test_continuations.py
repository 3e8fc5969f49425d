"""Texts that go on: tokens of exactly their bytes, the first space of an answer, and which tokens a score counts."""

from __future__ import annotations

import codecs
import json
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from llm_infer.base.errors import RequestError
from llm_infer.decoding.grammar import GrammarCompiler
from llm_infer.decoding.structured import StructuredOutputsParams
from llm_infer.text.continuations import continuation_tokens
from llm_infer.text.detokenizer import IncrementalDetokenizer
from llm_infer.text.tokenizer import Tokenizer

BYTES = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
PIECES = [
    "▁",
    "Ne",
    "▁New",
    "New",
    "▁York",
    "York",
    "▁Paris",
    "Paris",
    "▁yes",
    "yes",
    "no",
    "▁Answer",
    "Answer",
    ":",
    "fi",
]

MERGES = [("N", "e"), ("Ne", "w"), ("▁", "New"), ("n", "o"), ("f", "i")]


def tiny(kind: str) -> Tokenizer:
    """A few pieces in the forms in which tokenizer.json files have them."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **BYTES}
    letters = sorted({char for piece in PIECES for char in piece} - set(PIECES))
    vocabulary |= {piece: len(vocabulary) + n for n, piece in enumerate([*PIECES, *letters])}
    if kind == "bytes":
        alphabet = {char: 3 + n for n, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        backend = tokenizers.Tokenizer(models.BPE(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, **alphabet}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
    else:
        backend = tokenizers.Tokenizer(
            models.BPE(vocab=vocabulary, merges=MERGES, byte_fallback=True, unk_token="<unk>")
        )
        steps: list[Any] = [normalizers.NFKC()] if kind == "nfkc" else []
        if kind in ("prepend", "nfkc"):
            backend.normalizer = normalizers.Sequence([*steps, normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            strip = [decoders.Strip(" ", 1, 0)]
            backend.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
            )
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
            backend.decoder = decoders.Sequence(
                [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=kind), decoders.Fuse()]
            )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<tool>", rstrip=True, normalized=False)])
    return Tokenizer(backend, bos_token_id=1, eos_token_id=2, eos_token_ids=[2])


KINDS = ("prepend", "first", "always", "nfkc", "bytes")
TEXTS = ["New York", " Paris", "Paris", "  x ", "", "é", "ﬁ", "\n", "a</s>b", "<tool>  z", "日本", "▁", "Answer: yes"]


@pytest.fixture(scope="session")
def spm(spm_metadata: Mapping[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(spm_metadata)


@pytest.fixture(params=[*KINDS, "gguf"])
def model(request: pytest.FixtureRequest, spm: Tokenizer) -> Tokenizer:
    return spm if request.param == "gguf" else tiny(request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_exact_tokens_have_exactly_these_bytes(model: Tokenizer, text: str) -> None:
    ids = model.exact_tokens(text)
    if text != "▁" or model._byte_level:  # a piece spells U+2581 as a space
        assert b"".join(map(model.token_bytes, ids)) == text.encode()
    assert not any(map(model.is_special, ids))


def test_exact_tokens_are_the_usual_ones_where_they_can(spm: Tokenizer, tokenizer: Tokenizer) -> None:
    for text in (" Paris", "Water boils", "{'a': 1}"):
        assert tokenizer.exact_tokens(text) == tokenizer.encode(text, add_special_tokens=False)
        assert spm.exact_tokens(f" {text}") == spm.encode(text, add_special_tokens=False)


def test_a_byte_without_token_is_refused(bpe_metadata: Mapping[str, Any]) -> None:
    lacking = Tokenizer.from_gguf(bpe_metadata)
    byte = next(byte for byte in range(128) if bytes([byte]) not in map(lacking.token_bytes, range(lacking.vocab_size)))
    with pytest.raises(RequestError, match=f"0x{byte:02X}"):
        lacking.exact_tokens(chr(byte))


GRAMMARS: list[tuple[dict[str, Any], Callable[[str], object]]] = [
    ({"choice": ["New York", "Boston"]}, lambda text: text in ("New York", "Boston")),
    ({"choice": [" Paris", " London"]}, lambda text: text in (" Paris", " London")),
    ({"regex": "Answer: (yes|no)"}, lambda text: re.fullmatch("Answer: (yes|no)", text)),
    ({"regex": "[ ]{2}é日+"}, lambda text: re.fullmatch("[ ]{2}é日+", text)),
    ({"json": {"enum": [{"city": "New York"}]}}, lambda text: json.loads(text) == {"city": "New York"}),
    ({"grammar": 'start: "<" ("New" | " York")+ ">"'}, lambda text: re.fullmatch("<(New| York)+>", text)),
]


@pytest.mark.parametrize("asked", GRAMMARS, ids=lambda one: next(iter(one[0])))
def test_structured_output_can_always_go_on(model: Tokenizer, asked: tuple[dict[str, Any], Any]) -> None:
    values, right = asked
    size = model.vocab_size
    compiler = GrammarCompiler(
        [model.token_bytes(i) for i in range(size)],
        [i for i in range(size) if model.is_special(i)],
        sorted(model.eos_token_ids),
        model.exact_tokens,
    )
    grammar = compiler.compile(StructuredOutputsParams(**values))
    for seed in range(4):
        rng, matcher, output = random.Random(seed), grammar.matcher(), list[int]()
        while not output or output[-1] not in model.eos_token_ids:
            mask = np.zeros(-(-size // 32), np.int32)
            assert matcher.fill(output, mask) is None, (values, output)
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist()
            ends = [i for i in bits if i in model.eos_token_ids]
            output.append(rng.choice(ends if len(output) > 40 and ends else bits))
        stream = IncrementalDetokenizer(model, keep_first_space=True)
        text = stream.push(output) + stream.finish()
        assert right(text), (values, text)


def check(model: Tokenizer, prompt: list[int], new: list[int], skip: bool, cuts: random.Random) -> None:
    """The stream's text is `decode(prompt + new)` without the whole characters of the prompt, in any chunks."""
    shown = [i for i in prompt if not (skip and model.is_special(i))]
    data = b"".join(map(model.token_bytes, shown))
    data = data.removeprefix(b" ") if model.strips_leading_space else data
    before = codecs.getincrementaldecoder("utf-8")(errors="replace").decode(data)
    whole = model.decode([*prompt, *new], skip_special_tokens=skip)
    stream = IncrementalDetokenizer(model, prompt=prompt, skip_special_tokens=skip)
    pieces, rest = [], new
    while rest:
        size = cuts.randint(0, 3)
        pieces.append(stream.push(rest[:size]))
        rest = rest[size:]
    assert whole.startswith(before) and "".join([*pieces, stream.finish()]) == whole[len(before) :]


IDS = st.lists(st.one_of(st.integers(0, 262), st.integers(0, 690)), max_size=12)


@settings(max_examples=200, deadline=None)
@given(prompt=IDS, new=IDS, skip=st.booleans(), cuts=st.randoms(use_true_random=False))
def test_an_answer_is_what_comes_beyond_the_prompt(
    spm: Tokenizer, tokenizer: Tokenizer, prompt: list[int], new: list[int], skip: bool, cuts: random.Random
) -> None:
    for model in (spm, tokenizer):
        check(model, prompt, new, skip, cuts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_space_of_an_answer_stays(kind: str) -> None:
    model, rng = tiny(kind), random.Random(1)
    prompt, answer = model.encode("New"), model.encode(" Paris", add_special_tokens=False, begins=False)
    stream = IncrementalDetokenizer(model, prompt=prompt)
    assert stream.push(answer) + stream.finish() == " Paris"
    for _ in range(40):
        ids = [rng.randrange(model.vocab_size) for _ in range(8)]
        check(model, ids[: rng.randrange(8)], ids[4:], rng.random() < 0.5, rng)


def scored(model: Tokenizer, context: str, continuation: str) -> str:
    ids, start = continuation_tokens(model, context, continuation)
    stream = IncrementalDetokenizer(model, prompt=ids[:start])
    return stream.push(ids[start:]) + stream.finish()


@pytest.mark.parametrize(
    ("context", "continuation", "counted"),
    [
        ("Q: Name a city. A:", " New York City", " New York City"),
        ("Q: Name a city. A: ", "New York City", " New York City"),
        ("Q: Name a city. A: ", "Paris", " Paris"),
        ("Q: Name a city. A:\n", "Paris", "\nParis"),
        ("Q: Name a city. A:  \n ", " Paris", "  \n  Paris"),
        ("The city of Par", "is is big", " Paris is big"),
        ("", "Paris", "Paris"),
        (" ", "Paris", " Paris"),
        ("Wat", "er boils", "Water boils"),
    ],
)
def test_a_score_counts_all_of_the_continuation(
    tokenizer: Tokenizer, context: str, continuation: str, counted: str
) -> None:
    found = scored(tokenizer, context, continuation)
    assert found == counted


def test_scores_of_sentencepiece_models_begin_where_the_tokens_differ() -> None:
    model = tiny("prepend")
    for context, continuation in [("New", " York"), ("New ", "York"), ("Ne", "w York"), ("", "Paris"), ("N", "ew")]:
        found = scored(model, context, continuation)
        assert found.endswith(continuation) and (context + continuation).endswith(found.removeprefix(" ")), found


def test_a_continuation_without_token_is_refused(tokenizer: Tokenizer) -> None:
    for context in ("A", "A ", ""):
        with pytest.raises(RequestError, match="no token of its own"):
            continuation_tokens(tokenizer, context, "")
