"""Measurements on a machine with a GPU: ``python -m shadowllm.benchmarks.gpu --json FILE``."""
