"""KV cache: the host's books over the page pool (allocator, page tables, prefix cache); they import without jax."""
