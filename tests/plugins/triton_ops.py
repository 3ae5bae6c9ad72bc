"""Shared by the tests of the Triton kernels: the device, and the largest error.

The kernels run on the GPU or, if there is none, in Triton's interpreter. Their error may be twice that of PyTorch in
the same type, plus one rounding of the result and one of the intermediate values. (The interpreter truncates to
bfloat16, and a GPU rounds.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def with_types(*axes: Iterable[Any]) -> list[Any]:
    """Parameters: every combination of values of the axes, each with one of the types in turn.

    If each axis has three values or more, every value occurs with every type.
    """
    names, found = list(DTYPES), []
    for places in itertools.product(*(list(enumerate(axis)) for axis in axes)):
        name = names[sum(place for place, _ in places) % len(names)]
        values = [value for _, value in places]
        found.append(pytest.param(*values, DTYPES[name], id="-".join(map(str, (name, *values)))))
    return found


def assert_as_exact_as(found: Tensor, same_type: Tensor, exact: Tensor) -> None:
    """Check that the error of ``found`` is at most twice that of PyTorch in the same type, plus two roundings."""
    assert found.shape == exact.shape
    assert found.dtype == same_type.dtype
    floor = 2 * torch.finfo(found.dtype).eps * exact.abs().max()
    error = (found.cpu().double() - exact).abs().max()
    assert error <= 2 * (same_type.double() - exact).abs().max() + floor, f"{error} for results of {exact.abs().max()}"


def active(bound: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` ascending indices below ``bound``, then -1 up to ``bound``."""
    chosen = torch.randperm(bound, generator=generator)[:count].sort().values
    return F.pad(chosen, (0, bound - count), value=-1).int()


def on_device(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if tensor is None else tensor.to(DEVICE) for name, tensor in inputs.items()}


MLP_FORMS = {  # activation, gated, biases
    "llama": ("silu", True, False),
    "llama-biases": ("silu", True, True),
    "opt": ("relu", False, True),
    "galactica": ("gelu", False, True),
}
