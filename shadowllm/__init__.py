"""Contextual sparsity for OPT and Llama: predictor, sparse ONNX export, TensorRT engines, runtime."""

from shadowllm.errors import UserError

__version__ = "0.1.0"
__all__ = ["UserError", "__version__"]
