"""TensorRT plugins of the custom ops, for TensorRT-RTX and for the full TensorRT alike.

Nothing here imports either of them before `flavour.load` is asked to.
"""
