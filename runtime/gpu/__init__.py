"""Sessions on a GPU, with Triton or TensorRT."""
