"""The tiny models of the predictor's tests."""

from tests.predictor.conftest import llama, tiny

__all__ = ["llama", "tiny"]
