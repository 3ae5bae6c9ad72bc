"""Measurements: what is fast, how fast, and at what quality."""
