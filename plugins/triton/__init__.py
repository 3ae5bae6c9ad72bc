"""GPU kernels of the custom ops in Triton, for float32, float16 and bfloat16 with sums in float32.

One description of the launches serves three users: `ops` runs them on PyTorch tensors (on the CPU too,
under ``TRITON_INTERPRET=1``), and `compile` turns them into the programs that TensorRT plugins carry.

    tiles, select_topk, sparse_mlp, sparse_attention   kernels, each beside the function that plans its launches
    schedule                                           what a launch is, and how PyTorch runs one
    ops                                                the custom ops as functions of tensors
    compile                                            ahead of time, for engines
"""
