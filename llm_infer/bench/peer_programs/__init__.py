"""Programs that measure one engine on a GGUF file and print JSON lines; each runs in the Python that has the engine.

    python PROGRAM MODEL.gguf THREADS  →  {"metric": "decode_b8", "value": 123.4, "version": "1.2.3"} …

Metrics in tok/s: `prefill_512`, one prompt of 512 tokens, best of three; `decode_b1`, `decode_b8`, `decode_b32`, tokens of
all sequences ÷ median step time, greedy, after prompts of about 128 tokens. The programs import nothing of this package.
"""
