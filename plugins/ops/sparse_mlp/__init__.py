"""``SparseMLP``."""
