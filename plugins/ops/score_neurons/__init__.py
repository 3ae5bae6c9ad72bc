"""``ScoreNeurons``: importance scores of the neurons of an MLP, from a 4-bit copy of its weights."""
