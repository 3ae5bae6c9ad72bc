"""``ScoreNeurons``: how much each neuron of an MLP will add, going by a 4-bit copy of its weights."""
