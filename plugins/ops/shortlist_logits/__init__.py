"""``ShortlistLogits``: logits from a 4-bit copy of the output table, the best of them recomputed exactly."""
