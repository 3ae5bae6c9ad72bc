"""The dense model at equal bytes: all matrices rounded to the same number of bits, to compare with a selection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from shadowllm.bundle.cost_model import Itemsizes, step_traffic
from shadowllm.bundle.quantisation import Quantisation, rounded
from shadowllm.bundle.weight_names import is_quantised, rows_are_inputs
from shadowllm.evaluation.quality import Result, Sums
from shadowllm.models.decoder import Decoder
from shadowllm.models.sparsity import Budget
from shadowllm.models.spec import ModelSpec
from shadowllm.progress import Advance, no_progress

BITS = range(8, 1, -1)  # the most first


def uniform_bytes(spec: ModelSpec, bits: int, context: int, float_bytes: int = 4) -> int:
    """Return the bytes that a decode step of the uniformly quantised dense model reads.

    Args:
        bits: bits of an integer; each block of 32 elements of a row has one scale of 16 bits.
        context: tokens in the cache, including those of this step.
        float_bytes: bytes of an element of the KV cache, and of norms.
    """
    sizes = Itemsizes.of(float_bytes, matrices=Quantisation(bits).itemsize)
    return step_traffic(spec, sizes, context).total


def bits_for(spec: ModelSpec, bytes_per_token: float, context: int, float_bytes: int = 4) -> int | None:
    """Return the most bits, 8 to 2, with which the dense model reads at most ``bytes_per_token``; None below 2.

    The other arguments are those of `uniform_bytes`.
    """
    fitting = (bits for bits in BITS if uniform_bytes(spec, bits, context, float_bytes) <= bytes_per_token)
    return next(fitting, None)


def uniform_weights(weights: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Return canonical float32 weights with all matrices rounded to ``bits``; norms and biases stay as they are.

    Blocks lie along the inputs of each matrix, as in ONNX Runtime's ``MatMulNBits``.
    """
    return {name: _rounded(name, tensor, Quantisation(bits)) for name, tensor in weights.items()}


def _rounded(name: str, tensor: Tensor, q: Quantisation) -> Tensor:
    if not is_quantised(name):
        return tensor
    transposed = rows_are_inputs(name)
    matrix = torch.from_numpy(rounded((tensor.T if transposed else tensor).float().numpy(), q))
    return matrix.T.contiguous() if transposed else matrix


@torch.no_grad()
def evaluate_uniform(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    bits: Iterable[int],
    windows: Tensor,
    advance: Advance = no_progress,
) -> dict[int, Result]:
    """Measure the teacher-forced quality of the dense model at each number of bits.

    Only one rounded model is in memory at a time, beside the given one.

    Args:
        weights: canonical float32 tensors; results are compared with the model that they are.
        windows: int64 ``(n, seqlen)``; each is a separate text.
        advance: called with 1 after each window, ``n`` times per number of bits.

    Returns:
        The result for each number of bits. Its budgets and recalls are 1, because every unit is computed.
    """
    dense = Decoder(spec, weights)

    def measured(number: int) -> Result:  # at its end, its rounded model is freed
        decoder, sums = Decoder(spec, uniform_weights(weights, number)), Sums()
        for window in windows.split(1):
            sums.add(window, decoder(window), dense(window))
            advance(1)
        return sums.result(f"uniform-int{number}", Budget())

    return {number: measured(number) for number in bits}
