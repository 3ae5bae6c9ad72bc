"""Generates tokens and text with a session."""
