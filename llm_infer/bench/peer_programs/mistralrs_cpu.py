"""Measures mistral.rs on the CPU through its Python package."""

import itertools
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from reporting import numbers, report_all  # pyright: ignore[reportMissingImports]

SENTENCE = (
    "A boat leaves the harbour at noon and comes back with the tide, full of nets, ropes and a little silver fish. "
)
STEPS = 48


def main(path: Path, depths: list[int], plain_chat: str) -> None:
    from mistralrs import ChatCompletionRequest, Runner, Which  # pyright: ignore[reportMissingImports]

    which = Which.GGUF(quantized_model_id=str(path.parent), quantized_filename=path.name)
    try:
        runner = Runner(which=which, max_seqs=32, prefix_cache_n=0, jinja_explicit=plain_chat)
    except Exception as error:  # its message ends with a backtrace
        raise SystemExit(next(iter(str(error).strip().splitlines()), "the model does not load")) from None
    twenty = len(runner.tokenize_text(SENTENCE * 20, False, None))

    def prompt(length: int, more: int) -> str:
        return "A " * more + SENTENCE * round(20 * length / twenty) or "A"

    def stream(text: str, new_tokens: int):
        """Starts a request; only such a stream lets several requests run at once."""
        message = {"role": "user", "content": text}
        request = ChatCompletionRequest(
            [message], "default", max_tokens=new_tokens, temperature=0.0, top_k=1, stream=True, ignore_eos=True
        )
        return runner.send_chat_completion_request(request)

    def seconds(texts: list[str], new_tokens: int) -> float:
        started = time.perf_counter()
        streams = [stream(text, new_tokens) for text in texts]
        counts = [sum(1 for _ in each) for each in streams]
        if set(counts) != {new_tokens}:
            raise RuntimeError(f"asked for {new_tokens} tokens, it gave {min(counts)} to {max(counts)}")
        return time.perf_counter() - started

    def prefill(length: int) -> float:
        text = prompt(length, 0)
        tokens = len(runner.tokenize_text(text, False, None))
        return tokens / min(seconds([text], 1) for _ in range(3))

    def decode(size: int, length: int) -> float:
        if size == 1:
            ends = [time.perf_counter() for _ in stream(prompt(length, 0), STEPS + 1)]
            return 1 / statistics.median(after - before for before, after in itertools.pairwise(ends))
        # Prompts of one length end its run on a CPU ("input tensor is not contiguous"), so each has a token more. It says no
        # times of steps for a batch, so those of the prompts are taken off.
        texts = [prompt(length, more) for more in range(size)]
        return size * STEPS / (seconds(texts, STEPS + 1) - seconds(texts, 1))

    report_all(version("mistralrs"), "weights as in the file, cache in float16", prefill, decode, depths)


os.environ["RAYON_NUM_THREADS"] = sys.argv[2]
with tempfile.NamedTemporaryFile("w", suffix=".jinja") as template:
    template.write("{{ messages[0]['content'] }}")
    template.flush()
    main(Path(sys.argv[1]).resolve(), numbers(sys.argv[3]), template.name)
