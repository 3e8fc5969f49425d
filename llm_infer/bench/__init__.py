"""Benchmarks behind `llm-infer bench`."""
