"""``DenseDecoderLayer``: a layer of a Llama-like model with a dense MLP; only the native library has it."""
