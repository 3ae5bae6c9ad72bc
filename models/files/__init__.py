"""Readers of a checkpoint: its files, weights, configuration and tokenizer."""
