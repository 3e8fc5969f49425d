"""`llm-infer bench serving`: puts load on any OpenAI-compatible server and measures it. Needs no JAX and no tokenizer."""
