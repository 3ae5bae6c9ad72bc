"""``ScoreNeurons``."""
