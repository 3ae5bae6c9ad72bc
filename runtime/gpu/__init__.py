"""Sessions on a GPU: Triton and TensorRT."""
