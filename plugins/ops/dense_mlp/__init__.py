"""``DenseMLP``: an MLP with weights of 8 bits that computes all neurons; only the native library has it."""
