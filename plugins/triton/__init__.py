"""GPU kernels of the custom ops in Triton, for float32, float16 and bfloat16 with sums in float32.

One description of the launches serves two users: `launch` runs them on PyTorch tensors (on the CPU too,
under ``TRITON_INTERPRET=1``), and `compile` turns them into the programs that TensorRT plugins carry. The kernels
of an op, the plan of their launches and the op as a function of tensors are in its folder of ``plugins/ops``.

    tiles, project_back    parts of kernels, and a kernel, that several ops share
    schedule               what a launch is, and how PyTorch runs one
    launch                 an op's launches on tensors that fit its schema
    compile                ahead of time, for engines
    cache                  what a step does before attention
"""
