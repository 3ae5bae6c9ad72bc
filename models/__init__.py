"""What a model is: its sizes, its canonical weights, the reference decoder; and `files`, which reads checkpoints."""
