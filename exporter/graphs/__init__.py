"""Writes the ONNX graphs of a bundle."""
