"""Tokens and text from a session."""
