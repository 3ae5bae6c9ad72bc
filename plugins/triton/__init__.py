"""GPU kernels of the custom ops in Triton, for float32, float16 and bfloat16; sums are in float32.

One description of the launches has two users. `launch` runs them on PyTorch tensors (also on the CPU, with
``TRITON_INTERPRET=1``). `compile` turns them into the programs of TensorRT plugins. The kernels of an op, their
schedules and the op as a function of tensors are in its folder of ``plugins/ops``.

    tiles                  parts of kernels that several ops share
    low_bit                the same for packed integers: copies and residuals
    block_end              the sum at the end of attention or MLP; with the hidden states and a norm, a whole block
    output_projection      a kernel that several ops share, for active rows and for those of a low-bit copy
    hidden_values          what it multiplies, merged from spans of the cache
    head_choice            chooses and orders the heads of attention
    schedule               describes launches, and runs them with PyTorch
    launch                 checks tensors against an op's schema, and runs the op's launches
    compile                ahead-of-time compilation, for engines
    cache                  rotation and KV cache writes before attention
"""
