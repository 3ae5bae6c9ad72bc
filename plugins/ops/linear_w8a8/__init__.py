"""``LinearW8A8``: a linear layer with weights and inputs of 8 bits; only the native library has it."""
