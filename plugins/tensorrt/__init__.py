"""TensorRT plugins of the custom ops, for both TensorRT-RTX and the full TensorRT.

Nothing here imports either of them before `flavour.load` is called.
"""
