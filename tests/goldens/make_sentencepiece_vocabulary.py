"""Makes sentencepiece_500.json: a SentencePiece vocabulary learnt from this project's documents, with ids and texts.

The vocabulary is as Llama 2's: byte-pair merges, byte tokens, a space before a text. `sentencepiece` gives the ids of plain
text and the texts of ids; llama.cpp, which must agree with it, gives the ids where special tokens are looked for.

Run where sentencepiece, gguf, tokenizers and llama-cpp-python are installed:
    python tests/goldens/make_sentencepiece_vocabulary.py
"""

# ruff: noqa: E501 (rows of texts)

from __future__ import annotations

import io
import json
import random
import tempfile
from pathlib import Path

import llama_cpp
import sentencepiece
from make_tokenizer_goldens import run_llamacpp, write_gguf

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/add_a_model.md", "docs/add_a_kernel.md")
SIZE = 500
CONTROL = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    *("", " ", "  ", "   ", " " * 9, "a", " a", "a ", " a ", "  a  ", "a  b", "a   b    c", "the model", " the model", "the model "),
    *("The capital of France is", "The capital of France is ", " Paris", "Paris.", "New York", "Boston", "Answer: yes", "Hello, world!"),
    *("\n", "\n\n", "\n a", " \n", "a\n", "a\nb\n\nc", "\t", "\ta\tb", "a\t", "\r\n", "a\r\nb", "a\u00a0b", "\u3000x", "\u200b"),
    *("0", "7", "42", "2024-11-22", "1,000,000", "3.14159", "-1e-10", "x²", "½", "١٢٣", "v1.2.3-rc4"),
    *("def f(x):\n    return x + 1\n", "for (i = 0; i < n; ++i) { a[i] += b; }", '{"a": [1, {"b": null}], "c": "d"}', "snake_case"),
    *("max_num_batched_tokens=512", "`LLM(model)`", "--device cpu", "# Title\n\n- one\n- two\n", "https://example.org/a?b=c#d"),
    *("😀", " 😀 ", "👍🏽", "👨‍👩‍👧", "🇩🇪🇫🇷", "a😀b", "日本語のテキスト。", "你好，世界！", "안녕하세요 세계", "Привет, мир!", "שלום", "नमस्ते"),
    *("e\u0301", "é", "n\u0303o", "a\u0308\u0323", "Zażółć", "ﬁ", "→", "× –", "“x”", "…", "\ufffd", "\U0010ffff"),
    *("<s>", "</s>", "<unk>", " <s> a", "a</s>", "<|im_start|>user\nHi<|im_end|>\n", "x <|im_end|> y", "<|im_end|", "<0x0A>", "▁", "a▁▁b"),
    *("aaaaaaa", "hahahaha", "-----", "======", "tokenization tokenizer tokens", "the the  the   the"),
]  # fmt: skip


def learn() -> sentencepiece.SentencePieceProcessor:
    """The vocabulary of the documents."""
    paragraphs = [p for name in DOCUMENTS for p in (ROOT / name).read_text(encoding="utf-8").splitlines() if p.strip()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(paragraphs),
        model_writer=model,
        model_type="bpe",
        vocab_size=SIZE,
        character_coverage=0.995,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        control_symbols=CONTROL,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def metadata(pieces: sentencepiece.SentencePieceProcessor) -> dict[str, object]:
    """The vocabulary in GGUF's form."""
    kinds = ((pieces.IsUnknown, 2), (pieces.IsControl, 3), (pieces.IsByte, 6))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [pieces.IdToPiece(i) for i in range(SIZE)],
        "tokenizer.ggml.scores": [pieces.GetScore(i) for i in range(SIZE)],
        "tokenizer.ggml.token_type": [next((k for is_, k in kinds if is_(i)), 1) for i in range(SIZE)],
        "tokenizer.ggml.bos_token_id": pieces.bos_id(),
        "tokenizer.ggml.eos_token_id": pieces.eos_id(),
        "tokenizer.ggml.unknown_token_id": pieces.unk_id(),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.chat_template": TEMPLATE,
    }


def continuations(pieces: sentencepiece.SentencePieceProcessor) -> list[tuple[list[int], list[int], str]]:
    """(ids, ids after them, what the second adds to the text); none that ends or begins inside a character."""
    draw, found = random.Random(4), []
    spaced = [i for i in range(SIZE) if pieces.IdToPiece(i).startswith("▁")]
    prompts = [text for text in TEXTS if 4 < len(text) < 40]
    pairs = [([1], [draw.choice(spaced)]), ([], spaced[:2]), ([1], [3, draw.choice(spaced)]), ([1, 3], spaced[:1])]
    for text in prompts:
        ids = [1, *pieces.EncodeAsIds(text)]
        cut = draw.randrange(1, len(ids))
        pairs += [(ids[:cut], ids[cut:]), (ids, [draw.choice(spaced) for _ in range(2)])]
        pairs.append((ids, [draw.randrange(3, SIZE) for _ in range(6)]))
    for before, after in pairs:
        start, whole = pieces.DecodeIds(before), pieces.DecodeIds(before + after)
        if whole.startswith(start) and "\ufffd" not in start + whole[len(start) :]:
            found.append((before, after, whole[len(start) :]))
    return found


def main() -> None:
    """Writes the vocabulary with its goldens beside this file."""
    pieces = learn()
    assert pieces.GetPieceSize() == SIZE
    vocabulary = metadata(pieces)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        write_gguf(vocabulary, path)
        plain, special = ([case[3] for case in run_llamacpp(path, TEXTS, [(False, p)])["cases"]] for p in (False, True))
    cases = []
    for text, without, parsed in zip(TEXTS, plain, special, strict=True):
        ids = pieces.EncodeAsIds(text)
        assert ids == without, (text, ids, without)
        cases.append([text, ids, *([parsed] if parsed != ids else [])])
    found = continuations(pieces)
    write(Path(__file__).with_name("sentencepiece_500.json"), vocabulary, cases, found)


def write(path: Path, vocabulary: dict[str, object], cases: list, found: list) -> None:
    """One text a line, so that a change shows in a diff."""
    small = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True).encode
    source = {"sentencepiece": sentencepiece.__version__, "llama_cpp_python": llama_cpp.__version__}
    path.write_text(
        f'{{"source": {json.dumps(source)},\n"vocabulary": {{\n'
        + ",\n".join(f"{json.dumps(key)}: {small(value)}" for key, value in vocabulary.items())
        + '},\n"texts": [\n'
        + ",\n".join(map(small, cases))
        + '],\n"continuations": [\n'
        + ",\n".join(map(small, found))
        + "]}\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
