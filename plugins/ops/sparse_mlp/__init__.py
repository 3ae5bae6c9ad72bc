"""``SparseMLP``: an MLP of the active neurons."""
