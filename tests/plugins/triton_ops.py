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

from shadowllm.bundle.quantisation import NESTED, Quantisation, dequantise_nested, quantise_nested
from tests.plugins.guard_pages import guarded

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


FORMATS = pytest.mark.parametrize("q", NESTED.values(), ids=NESTED)


def nested(rows: Tensor, q: Quantisation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nested integers of rows, as the ops take them: copy, its scales, and residual; and their values in float32."""
    copy, scales, residual = quantise_nested(rows.float().numpy(), q)
    values = dequantise_nested(copy, scales, residual, rows.shape[1], q)
    parts = (copy.reshape(*scales.shape, -1), scales, residual, values)
    return tuple(map(torch.from_numpy, parts))


def with_residuals(inputs: dict[str, Tensor | None], q: Quantisation) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same inputs of an op, with nested integers, and with the values of these as floats."""
    integers, floats = dict(inputs), dict(inputs)
    for name, rows in inputs.items():
        if name.startswith("w_") and rows is not None:
            part = name.removeprefix("w_")
            copy, scales, residual, values = nested(rows, q)
            integers |= {name: residual, f"c_{part}": copy, f"cs_{part}": scales}
            floats |= {name: values, f"c_{part}": copy, f"cs_{part}": scales}
    return integers, floats


def on_device(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Copies of inputs on the device. In the interpreter, a kernel that leaves the memory of one ends the process."""
    move = (lambda tensor: tensor.to(DEVICE)) if DEVICE == "cuda" else guarded
    return {name: None if tensor is None else move(tensor) for name, tensor in inputs.items()}


MLP_FORMS = {  # activation, gated, biases
    "llama": ("silu", True, False),
    "llama-biases": ("silu", True, True),
    "opt": ("relu", False, True),
    "galactica": ("gelu", False, True),
}
