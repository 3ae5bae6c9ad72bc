"""The session that uses ONNX Runtime."""
