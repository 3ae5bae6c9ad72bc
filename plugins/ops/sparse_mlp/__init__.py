"""``SparseMLP``: an MLP that computes only its active neurons."""
