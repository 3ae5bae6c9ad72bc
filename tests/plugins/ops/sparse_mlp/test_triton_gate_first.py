"""The Triton kernels of ``SparseMLP`` without indices and copy; see `triton_ops`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from shadowllm.models.decoder import mlp_product
from shadowllm.plugins.ops.sparse_mlp import reference
from shadowllm.plugins.ops.sparse_mlp.launcher import sparse_mlp
from tests.plugins.ops.sparse_mlp.gate_first_inputs import CASES, SILENT, gate_first_inputs
from tests.plugins.triton_ops import DTYPES, assert_as_exact_as, on_device

pytestmark = pytest.mark.slow

SIZES = [(41, 7, 1, 1), (300, 88, 1, 1), (123, 88, 3, 1), (41, 130, 2, 70), (41, 1100, 1, 1)]  # D, F, B, S


def tensors(form, size, dtype=torch.float32):
    """Weights are divided by the root of their width, so that sums do not overflow float16."""
    scale = {"w_gate": size[0] ** -0.5, "w_up": size[0] ** -0.5, "w_down": size[1] ** -0.5}
    found = {}
    for name, array in gate_first_inputs(form, size).items():
        tensor = None if array is None else torch.from_numpy(np.asarray(array))
        floats = tensor is not None and tensor.is_floating_point()
        found[name] = (tensor * scale.get(name, 1)).to(dtype) if floats else tensor
    return found


def dense(inputs, activation, threshold, dtype):
    """All neurons, in plain PyTorch."""
    x = inputs["x"].to(dtype)

    def project(part):
        bias = inputs[f"b_{part}"]
        y = x @ inputs[f"w_{part}"].to(dtype).T
        return y if bias is None else y + bias.to(dtype)

    parts = ("up",) if inputs["w_gate"] is None else ("gate", "up")
    y = mlp_product(activation, threshold, *map(project, parts)) @ inputs["w_down"].to(dtype)
    return y if inputs["b_down"] is None else y + inputs["b_down"].to(dtype)


# Every activation at one size, and every size and type with one activation.
POINTS = [(case, SIZES[1], torch.float32) for case in CASES]
POINTS += [(CASES[0], size, torch.float32) for size in SIZES]
POINTS += [(CASES[form], size, dtype) for form in (0, 2) for size in SIZES[1:4] for dtype in list(DTYPES.values())[1:]]


@pytest.mark.parametrize(("case", "size", "dtype"), POINTS, ids=str)
def test_gate_first(case, size, dtype):
    activation, threshold, form = case
    # No gate of these inputs is at 0.5 but for rounding, where one side would leave out what the other adds.
    inputs, threshold = tensors(form, size, dtype), min(threshold, 0.5)
    found, chosen = sparse_mlp(**on_device(inputs), activation=activation, threshold=threshold)
    exact = dense(inputs, activation, threshold, torch.float64)
    assert_as_exact_as(found, dense(inputs, activation, threshold, dtype), exact)
    numbers = {name: None if tensor is None else tensor.float().numpy() for name, tensor in inputs.items()}
    wanted = reference.sparse_mlp(**numbers, activation=activation, threshold=threshold)
    np.testing.assert_array_equal(chosen.cpu(), wanted[1])
    np.testing.assert_allclose(
        found.float().cpu(), wanted[0], atol=4 * torch.finfo(dtype).eps * np.abs(wanted[0]).max()
    )


@pytest.mark.parametrize("form", ["llama-biases", "opt"])
def test_rows_of_silent_neurons_are_not_read(form):
    inputs = tensors(form, (123, 88, 1, 1))
    expected, _ = sparse_mlp(**on_device(inputs), activation="relu")
    for name in ("w_up", "w_down") if form == "llama-biases" else ("w_down",):
        inputs[name][::SILENT] = torch.nan
    found, _ = sparse_mlp(**on_device(inputs), activation="relu")
    assert torch.equal(found, expected)


def test_a_gate_that_is_no_number_is_not_hidden():
    inputs = tensors("llama", (41, 7, 1, 1))
    inputs["w_gate"][5, 3] = torch.nan
    found, chosen = sparse_mlp(**on_device(inputs), activation="relu")
    assert found.isnan().all()
    assert 5 in chosen


def test_refuses_an_activation_that_is_never_zero():
    with pytest.raises(ValueError, match="silu is never zero"):
        sparse_mlp(**on_device(tensors("llama", (41, 7, 1, 1))), activation="silu")
