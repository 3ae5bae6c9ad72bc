"""``DecoderLayer``: a layer of a Llama-like model as one op; only the native library has it."""
