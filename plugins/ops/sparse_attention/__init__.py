"""``SparseAttention``: attention of the active query heads over the KV cache, and the output projection."""
