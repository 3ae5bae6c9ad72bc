"""The ONNX domain of our custom ops: bundles and engines record which version of it they hold."""

DOMAIN = "shadowllm"
VERSION = 1
