"""Writes ONNX graphs and the bundle, and builds TensorRT engines from it."""
