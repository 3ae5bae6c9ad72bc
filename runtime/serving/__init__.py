"""Continuous batching: many requests share the slots of one session."""
