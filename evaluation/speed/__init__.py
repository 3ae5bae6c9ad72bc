"""Timing of sessions, each in its own process, and the report."""
