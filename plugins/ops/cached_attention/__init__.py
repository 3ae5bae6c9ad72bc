"""``CachedAttention``: writes the cache and attends with all heads; only the native library has it."""
