"""Model descriptions: sizes, canonical weights and the reference decoder. `files` reads checkpoints."""
