"""ONNX graphs, the bundle on disk, and TensorRT engines built from it."""
