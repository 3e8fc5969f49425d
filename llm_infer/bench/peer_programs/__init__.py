"""Programs that measure one engine on a model file and print JSON lines; each runs in the Python that has the engine.

    python PROGRAM MODEL THREADS DEPTHS  →  {"metric": "decode_b8", "value": 123.4, "version": "1.2.3", "precision": "…"} …

`DEPTHS` are whole numbers separated by commas, or empty. Metrics in tok/s: `prefill_512`, one prompt of 512 tokens, best of
three; `decode_b1`, `decode_b8`, `decode_b32`, tokens of all sequences ÷ median step time, greedy, after prompts of about 128
tokens; `decode_b1_d2048`, the same of one sequence with about 2048 tokens before it. Where an engine cannot measure one, the
value is null and `why` says why. The programs import nothing of this package but their neighbours.
"""
