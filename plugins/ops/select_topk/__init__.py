"""``SelectTopK``."""
