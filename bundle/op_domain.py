"""The ONNX domain of the custom ops. Bundles and engines record its version."""

DOMAIN = "shadowllm"
VERSION = 1
