"""TensorRT engines from the ONNX pieces."""
