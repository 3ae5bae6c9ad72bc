"""Timing of sessions, each in a process of its own, and the report."""
