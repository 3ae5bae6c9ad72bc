"""What a checkpoint holds: its files, weights, configuration and tokenizer."""
