"""Compares the Triton kernels with float64 arithmetic; see `triton_ops`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from shadowllm.models.decoder import ACTIVATIONS
from shadowllm.plugins.ops.sparse_mlp.launcher import sparse_mlp
from tests.plugins.triton_ops import MLP_FORMS, active, assert_as_exact_as, on_device, with_types

pytestmark = pytest.mark.slow

MLP_SIZES = [  # D, F, B, S, count
    (41, 7, 1, 1, 7),
    (123, 88, 1, 1, 45),
    (123, 88, 1, 1, 0),
    (300, 700, 1, 1, 301),
    (123, 88, 3, 1, 41),
    (41, 123, 17, 1, 123),
    (41, 88, 2, 3, 1),
    (123, 300, 1, 70, 123),
    (64, 88, 2, 5, 0),
]


def mlp_inputs(form: str, size: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor | None]:
    width, neurons, batch, seqlen, count = size
    _, gated, biases = MLP_FORMS[form]
    generator = torch.Generator().manual_seed(width)

    def normal(*shape: int, given: bool = True) -> Tensor | None:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype) if given else None

    return {
        "x": torch.randn(batch, seqlen, width, generator=generator).to(dtype),
        "indices": active(neurons, count, generator),
        "count": torch.tensor(count).int(),
        "w_gate": normal(neurons, width, given=gated),
        "b_gate": normal(neurons, given=gated and biases),
        "w_up": normal(neurons, width),
        "b_up": normal(neurons, given=biases),
        "w_down": normal(neurons, width),
        "b_down": normal(width, given=biases),
    }


def dense_mlp(inputs: dict[str, Tensor | None], activation: str, dtype: torch.dtype) -> Tensor:
    """The op in plain PyTorch, in a given type."""
    rows = inputs["indices"][: int(inputs["count"])]
    rows = rows[rows >= 0].long()
    x = inputs["x"].to(dtype)

    def project(part: str) -> Tensor:
        bias = inputs[f"b_{part}"]
        return F.linear(x, inputs[f"w_{part}"][rows].to(dtype), None if bias is None else bias[rows].to(dtype))

    act = ACTIVATIONS[activation]
    hidden = act(project("up")) if inputs["w_gate"] is None else act(project("gate")) * project("up")
    y = hidden @ inputs["w_down"][rows].to(dtype)
    return y if inputs["b_down"] is None else y + inputs["b_down"].to(dtype)


@pytest.mark.parametrize(("form", "size", "dtype"), with_types(MLP_FORMS, MLP_SIZES))
def test_mlp(form, size, dtype):
    activation = MLP_FORMS[form][0]
    inputs = mlp_inputs(form, size, dtype)
    found, chosen = sparse_mlp(**on_device(inputs), activation=activation)
    assert chosen is None
    assert_as_exact_as(found, dense_mlp(inputs, activation, dtype), dense_mlp(inputs, activation, torch.float64))


@pytest.mark.parametrize("tokens", [(1, 1), (3, 1), (1, 20)])
def test_mlp_skips_indices_out_of_range(tokens):
    inputs = mlp_inputs("llama", (41, 88, *tokens, 3), torch.float32)
    inputs["indices"][:5] = torch.tensor([4, 88, -7, 2**31 - 1, 9])
    inputs["count"] = torch.tensor(5).int()
    valid = inputs | {"indices": torch.tensor([4, 9]), "count": torch.tensor(2)}
    found, _ = sparse_mlp(**on_device(inputs), activation="silu")
    exact = dense_mlp(valid, "silu", torch.float64)
    assert_as_exact_as(found, dense_mlp(valid, "silu", torch.float32), exact)


@pytest.mark.parametrize("count", [-3, 0xAAAAAAAA - 2**32, 89])
def test_mlp_takes_a_count_out_of_range_for_the_nearest(count):
    inputs = mlp_inputs("opt", (41, 88, 1, 1, 88), torch.float32)
    valid = inputs | {"count": torch.tensor(min(88, max(0, count)))}
    found, _ = sparse_mlp(**on_device(inputs | {"count": torch.tensor(count).int()}), activation="relu")
    assert_as_exact_as(found, dense_mlp(valid, "relu", torch.float32), dense_mlp(valid, "relu", torch.float64))


def test_mlp_hides_no_nan():
    inputs = mlp_inputs("opt", (41, 7, 1, 1, 7), torch.float32)
    inputs["x"][0, 0, 3] = float("nan")
    assert sparse_mlp(**on_device(inputs), activation="relu")[0].isnan().all()


def test_results_do_not_depend_on_the_run():
    inputs = on_device(mlp_inputs("llama", (300, 700, 1, 1, 301), torch.float16))
    first, second = (sparse_mlp(**inputs, activation="silu")[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"w_up": torch.zeros(88, 41, dtype=torch.float16)}, "w_up is torch.float16, expected torch.float32"),
        ({"count": torch.tensor(3)}, "count is torch.int64"),
        ({"w_down": torch.zeros(41, 88).T}, "w_down must be contiguous"),
        ({"w_down": torch.zeros(87, 41)}, "w_down has shape"),
        ({"b_up": torch.zeros(88, 1)}, "b_up has shape"),
        ({"x": torch.zeros(1, 1, 41, dtype=torch.float64)}, "x is torch.float64"),
    ],
)
def test_mlp_refuses(wrong, message):
    inputs = mlp_inputs("llama", (41, 88, 1, 1, 3), torch.float32) | wrong
    with pytest.raises(ValueError, match=message):
        sparse_mlp(**on_device(inputs), activation="silu")


def test_mlp_refuses_an_activation():
    inputs = mlp_inputs("llama", (41, 88, 1, 1, 3), torch.float32)
    with pytest.raises(ValueError, match="no activation 'tanh'"):
        sparse_mlp(**on_device(inputs), activation="tanh")
