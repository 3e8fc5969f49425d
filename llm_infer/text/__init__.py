"""Text layer: tokenizers, chat templates and incremental detokenisation. Imports without jax."""
