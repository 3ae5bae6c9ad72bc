"""The custom ops: one folder per op holds everything about it, and `registry` gives access by name."""
