"""``SparseAttention``."""
