"""Makes tokenizer_llamacpp.json: the ids llama.cpp gives for the default model and for tiny vocabularies made here.

Run where llama-cpp-python, gguf and tokenizers are installed:
    python tests/goldens/make_tokenizer_goldens.py SmolLM2-135M-Instruct.Q4_1.gguf
"""

# ruff: noqa: E501 (rows of texts)

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXTS = [
    # prose and contractions
    *("", " ", "a", "Hello", "Hello, world!", " Hello world", "Hello  world", "hello\n", "The quick brown fox jumps over"),
    *("I'm you're he's we'll they'd I've don't", "I'M YOU'RE HE'S WE'LL THEY'D I'VE", "'s't're've'm'll'd", "' s ' t", "l'été"),
    *("''s", "'S'T", "O'Neill's", "rock'n'roll", "“smart” ‘quotes’ — and – dashes…", "e.g. i.e. etc.", "Mr. O'Brien, Jr."),
    *("once upon a time", "supercalifragilisticexpialidocious", "ALLCAPS camelCase snake_case kebab-case", "x" * 300),
    # digits and number-like characters
    *("0", "7", "42", "123", "1234", "12345", "1234567890", "3.14159", "-1e-10", "1,000,000", "0x1F", "2²", "x²y³", "½", "1½ cups"),
    *("¼½¾⅓⅔", "²³¹⁴⁵", "₀₁₂", "①②③", "Ⅷ ⅷ", "٠١٢٣٤٥٦٧٨٩", "عام ٢٠٢٤", "०१२३", "০১২", "๐๑๒", "㊿ ㉑", "１２３", "٣.١٤", "10²⁰"),
    *("a1b2c3", "v1.2.3-rc4", "2024-11-22T21:24:00Z", "+49 (0)30 123456", "$1,234.56", "€9.99", "50%", "#1", "№5", "1st 2nd 3rd"),
    # code
    *("def f(x):\n    return x + 1\n", "for (int i = 0; i < n; ++i) { a[i] += b[i]; }", "#include <stdio.h>\r\n\r\nint main() {}\r\n"),
    *("if x:\n\tif y:\n\t\tpass", "SELECT * FROM t WHERE a >= 10 AND b != 'x';", '{"a": [1, 2, {"b": null}]}', "a->b::c.d()[e]"),
    *("<div class=\"x\">&amp;</div>", "\\n\\t\\u00e9", "!@#$%^&*()_+-=[]{}|;':\",./<>?", "`~", "===", "!==", "<<<<>>>>", "//////", "######"),
    *("--------------------", "....", "?!?!", "https://example.org/a?b=c&d=e#f", "me@example.org", "C:\\Users\\x", "/usr/bin/env"),
    *("λx.x", "∀x∈ℝ: x²≥0", "∑∫√∞≠≤", "→⇒↔", "█▓▒░", "│├└─", "f(x)=\n\n\n  y", "\tint\tx;\t// y", "a\\b", "$$E=mc^2$$", "<|", "|>", "<||>"),
    # white space
    *("  ", "   ", " " * 7, " " * 40, "\t", "\t\t\t", "\n", "\n\n", "\n\n\n", "\r", "\r\n", "\r\n\r\n", " \n", "\n ", " \n \n ", "a \n b"),
    *("a  b", "a   b", "a\tb", "a\t b", "a \tb", "a\n\nb", "a\r\nb", "a\rb", "trailing ", "trailing  ", "trailing\n", "\u00a0", "a\u00a0b"),
    *("\u2003x", "\u3000x\u3000", "\u2028\u2029", "\x85", "\x0b\x0c", "a\u200bb", "\ufeffbom", "x" + " " * 100 + "y", "\n" * 30, " \t" * 9),
    # scripts
    *("こんにちは世界", "日本語のテキスト、句読点。", "你好，世界！", "中文和English混合123", "漢字", "안녕하세요 세계", "한국어 텍스트 123"),
    *("Привет, мир!", "Съешь ещё этих мягких французских булок", "Γειά σου Κόσμε", "שלום עולם", "مرحبا بالعالم", "مرحبا ABC 123 بالعالم"),
    *("नमस्ते दुनिया", "সুপ্রভাত", "வணக்கம்", "สวัสดีชาวโลก", "ສະບາຍດີ", "ខ្ញុំ", "မင်္ဂလာပါ", "Xin chào thế giới", "გამარჯობა", "Բարեւ", "ሰላም"),
    *("Zażółć gęślą jaźń", "Ærøskøbing", "Straße", "İstanbul ı", "ﬁ ﬂ ﬃ", "ẞß", "Ǆǅǆ", "ʻOkina", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "𐍈𐌰", "𒀀𒀁", "𠜎𠜱", "ꙮ", "Ⓐⓑ"),
    # marks, direction, emoji
    *("e\u0301", "é", "a\u0308\u0323", "Z\u0351\u036b\u0343", "n\u0303o", "\u0301alone", "क्\u200dष", "\u202eright to left\u202c", "\u2066x\u2069"),
    *("😀", "😀😃😄", "👍🏽", "👨‍👩‍👧‍👦", "👩🏾‍🚀", "🏳️‍🌈", "🇩🇪🇫🇷", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "1️⃣", "☃️❤️", "✨ sparkle ✨", "(╯°□°)╯︵ ┻━┻", "ʕ•ᴥ•ʔ", "🤦🏼‍♂️", "\ufe0f", "\u200d"),
    # control characters, oddities
    *("\x00", "a\x00b", "\x01\x02\x03", "\x04\x06\x13\x14\x16\x1d", "x\x04y", "\x1b[31mred\x1b[0m", "\x7f", "\x80\x9f", "\xad", "\ufffd", "\uffff"),
    *("\ue000", "\U000f0000", "\U0010ffff", "\u0378", "Ã©", "â€™", "ĠĊ", "▁", "▁▁x", "Ń", "Ġthe", "<0x0A>", "<0xFF>", "\\x00", "%00", "&#0;", "[UNK]"),
    # special tokens in text
    *("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", "<|im_end|><|im_end|>", "a<|im_end|>b", " <|im_end|> "),
    *("<|im_end|", "<|im_END|>", "<|endoftext|>", "x <|endoftext|> y", "<s>", "</s>", "<s>x</s>", "a <s> b", "<unk>", "<<s>>", "<repo_name>x"),
    *("<jupyter_start><jupyter_code>1+1", "<|im_start|><|im_start|>", "<filename>a.py\n", "[INST] x [/INST]", "<|user|>\n hi", "<|user|>  hi"),
    *("<|user|>", "##", "a##b", "## ##", "\n\n##\n", "<|im_end|>\n\n\n", "<empty_output>", "<gh_stars>100", "<|im_start|>系统\n你好<|im_end|>"),
    # runs that can be merged in more than one way
    *("aaaaaaa", "aaaa aaaa", "ababababa", "hahahahaha", "mississippi", "banana bananas", "nanana", "nananana", "\u3000" * 5, "ーーーー", "----->", "_" * 33),
]  # fmt: skip

WORDS = ["the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he", "his", "but", "at", "are", "this", "have", "from", "or", "had", "an", "they", "which", "one"]  # fmt: skip
POOLS = ["abcdefghij", "0123456789²½٣१", " \t\n\r\u00a0\u3000", ".,;:!?'\"()[]{}<>|=+-*/\\_", "éèñüßøçž", "日本語中文한국", "שלוםمرحبا", "😀👍🏽\u200d\ufe0f\u0301"]  # fmt: skip


def random_texts(count: int) -> list[str]:
    """Mixtures of words, specials and characters of all kinds, the same on every run."""
    draw = random.Random(2)
    pieces = [*WORDS, "'s", "'LL", "<|im_end|>", "<s>", "  ", "\n\n", "aaa", "##"]
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(draw.randint(2, 9)):
            pool = draw.choice(POOLS)
            run = "".join(draw.choice(pool) for _ in range(draw.randint(1, 5)))
            parts.append(draw.choice(pieces) if draw.random() < 0.4 else run)
        texts.append(draw.choice(("", " ")).join(parts))
    return texts


def learn(texts: list[str], pre_tokenizer: pre_tokenizers.PreTokenizer, size: int) -> tuple[list[str], list[list[str]]]:
    """(characters, merges in order) of a BPE learnt from `texts`."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizer
    learner.train_from_iterator(texts * 3 + WORDS * 9, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    model = json.loads(learner.to_str())["model"]
    return sorted(token for token in model["vocab"] if len(token) == 1), [list(merge) for merge in model["merges"]]


def tiny_bpe(texts: list[str]) -> dict[str, object]:
    """Byte-level vocabulary with some bytes left out, special and user-defined tokens, and a token no merge reaches."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    _, merges = learn([t for t in texts if t.isascii()], byte_level, 420)
    left_out = {"Ą", "ą", "ß", "õ"}  # bytes 0x04, 0x05, 0xDF, 0xF5 in GPT-2's alphabet
    alphabet = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c not in left_out]
    special = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|endoftext|>", "<|eot_id|>"]
    merged = dict.fromkeys(a + b for a, b in merges if a + b != "##")
    merges = [pair for pair in merges if "".join(pair) in merged and left_out.isdisjoint("".join(pair))]
    tokens = [*special, *alphabet, *merged, "nanana", "##"]
    types = [3] * len(special) + [1] * (len(tokens) - len(special) - 1) + [4]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in merges],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 3,
    }


def tiny_spm(texts: list[str]) -> dict[str, object]:
    """SentencePiece-like vocabulary with byte tokens; one piece holds a character that is no token by itself."""
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False)
    characters, merges = learn([t for t in texts if len(t) < 120], metaspace, 900)
    common = [c for c in characters if c.isascii() and c.isprintable()] + ["▁", "é", "日", "本", "ー", "２"]
    pieces = [a + b for a, b in merges if all(c in common for c in a + b)]
    head = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tail = ["<|im_end|>", "<|user|>", "<|endoftext|>", "##"]
    pieces = [*dict.fromkeys([*pieces, "▁▁", "▁▁▁▁", "aa", "aaa", "ñ~"])]
    pieces = [piece for piece in pieces if piece not in head + tail]
    tokens = [*head, *pieces, *common, *tail]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(head) + [-float(i) for i in range(len(pieces) + len(common))] + [0.0] * len(tail),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(common)) + [3, 3, 3, 4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip


def write_gguf(metadata: dict[str, object], path: Path) -> None:
    """A GGUF file without tensors that llama.cpp accepts as a vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("context_length", "block_count", "embedding_length", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"llama.{key}", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_llamacpp(path: Path, texts: list[str], settings: list[tuple[bool, bool]]) -> dict[str, object]:
    """End-of-generation ids, and [text index, add_special, parse_special, ids] where a setting changes the ids."""
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)  # owns the vocabulary
    vocab = model._model.vocab
    count = llama_cpp.llama_vocab_n_tokens(vocab)
    cases = []
    for index, text in enumerate(texts):
        data, seen = text.encode(), []
        for add_special, parse_special in settings:
            room = len(data) + 8
            ids = (llama_cpp.llama_token * room)()
            found = llama_cpp.llama_tokenize(vocab, data, len(data), ids, room, add_special, parse_special)
            assert found >= 0, text
            if ids[:found] not in seen:
                seen.append(ids[:found])
                cases.append([index, add_special, parse_special, ids[:found]])
    return {"eos": [i for i in range(count) if llama_cpp.llama_vocab_is_eog(vocab, i)], "cases": cases}


def main() -> None:
    """Writes the goldens beside this file."""
    texts = list(dict.fromkeys(TEXTS + random_texts(40)))
    bpe, spm = tiny_bpe(texts), tiny_spm(texts)
    variants: dict[str, tuple[str | None, dict[str, object]]] = {
        "smollm2": (None, {}),
        **{f"bpe {pre}": ("bpe", {"tokenizer.ggml.pre": pre}) for pre in ("gpt-2", "default", "qwen2", "deepseek-v3")},
        "bpe smollm, bos and eos": (
            "bpe",
            {
                "tokenizer.ggml.pre": "smollm",
                "tokenizer.ggml.add_bos_token": True,
                "tokenizer.ggml.add_eos_token": True,
            },
        ),
        **{f"bpe {pre}": ("bpe", {"tokenizer.ggml.pre": pre}) for pre in ("llama-bpe", "gpt-4o", "tekken")},
        "spm": ("spm", {}),
        "spm no prefix": ("spm", {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}),
        "spm phi-3": ("spm", {"general.name": "Phi-3 test", "tokenizer.ggml.add_eos_token": True}),
    }
    vocabularies, results = {"bpe": bpe, "spm": spm}, []
    with tempfile.TemporaryDirectory() as folder:
        for name, (vocabulary, overrides) in variants.items():
            path = Path(sys.argv[1])
            settings = [(True, True), (True, False)]
            if vocabulary is not None:
                path = Path(folder) / "vocabulary.gguf"
                write_gguf({**vocabularies[vocabulary], **overrides}, path)
                settings = [(True, True), (False, False)]
            result = {"name": name, "vocabulary": vocabulary, "overrides": overrides}
            results.append({**result, **run_llamacpp(path, texts, settings)})
    write(Path(__file__).with_name("tokenizer_llamacpp.json"), vocabularies, texts, results)


def write(path: Path, vocabularies: dict[str, dict[str, object]], texts: list[str], results: list[dict]) -> None:
    """One text and one model a line, so that a change shows in a diff."""

    def lines(items: list[str]) -> str:
        return ",\n".join(items)

    source = {"llama_cpp_python": llama_cpp.__version__, "model": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    small = json.JSONEncoder(separators=(",", ":")).encode
    path.write_text(
        f'{{"source": {json.dumps(source)},\n"vocabularies": {{\n'
        + lines([f"{json.dumps(name)}: {small(data)}" for name, data in vocabularies.items()])
        + '},\n"texts": [\n'
        + lines([json.dumps(text) for text in texts])
        + '],\n"models": [\n'
        + lines([small(result) for result in results])
        + "]}\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
