"""Compares the Triton kernels with float64 arithmetic where the full rows are nested integers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from shadowllm.bundle.quantisation import NESTED, Quantisation
from shadowllm.plugins.ops.sparse_mlp import reference
from shadowllm.plugins.ops.sparse_mlp.launcher import sparse_mlp
from tests.plugins.ops.sparse_mlp.test_triton_rest import mixed_mlp, rest_inputs
from tests.plugins.triton_ops import FORMATS, MLP_FORMS, assert_as_exact_as, on_device, with_residuals

pytestmark = pytest.mark.slow

SIZES = [  # D, F, B, S, count
    (8, 7, 1, 1, 7),
    (41, 7, 1, 1, 1),
    (123, 88, 1, 1, 0),
    (300, 40, 1, 1, 27),
    (64, 33, 3, 1, 33),
    (41, 33, 17, 1, 20),
    (130, 33, 2, 3, 1),
    (123, 40, 1, 20, 33),
]


def nested_inputs(
    form: str, size: tuple[int, ...], q: Quantisation, rest: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Any], dict[str, Any]]:
    inputs = rest_inputs(form, size, torch.float32, rest)
    floats = {name: t.to(dtype) for name, t in inputs.items() if name[:2] in ("x", "b_") and t is not None}
    return with_residuals(inputs | floats, q)


def assert_mlp(integers: dict[str, Any], floats: dict[str, Any], rows: Tensor, found: Tensor, activation: str) -> None:
    exact, own = (mixed_mlp(floats, rows, activation, kind) for kind in (torch.float64, floats["x"].dtype))
    assert_as_exact_as(found, own, exact)
    if found.dtype == torch.float32:
        numbers = {name: None if t is None else t.numpy() for name, t in integers.items()}
        given = numbers | {"indices": rows.numpy(), "count": len(rows)}
        assert_as_exact_as(torch.from_numpy(reference.sparse_mlp(**given, activation=activation)[0]), own, exact)


@FORMATS
@pytest.mark.parametrize(("place", "size"), list(enumerate(SIZES)), ids=str)
def test_mlp(size, place, q):
    """With and without indices, a rest and a gate, by turns."""
    form, rest, inside = ("llama-biases", "opt")[place % 2], int(place % 3 != 0), place % 4 > 1
    activation = MLP_FORMS[form][0]
    integers, floats = nested_inputs(form, size, q, rest)
    chosen_by = {"indices": None} if inside else {}
    found, chosen = sparse_mlp(**on_device(integers | chosen_by), activation=activation)
    rows = integers["indices"] if chosen is None else chosen.cpu()
    assert_mlp(integers, floats, rows[: size[-1]], found, activation)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [(1, 1), (3, 1), (1, 20)])
def test_sixteen_bits(tokens, dtype, q):
    integers, floats = nested_inputs("llama-biases", (75, 40, *tokens, 25), q, dtype=dtype)
    found, _ = sparse_mlp(**on_device(integers), activation="silu")
    assert_mlp(integers, floats, integers["indices"][:25], found, "silu")


@FORMATS
@pytest.mark.parametrize("tokens", [(1, 1), (1, 20)])
def test_hostile_indices_and_counts_read_nothing_outside(tokens, q):
    integers, floats = nested_inputs("llama", (41, 40, *tokens, 40), q, rest=0)
    integers["indices"][:4] = torch.tensor([3, 40, -7, 2**31 - 1])
    for count, rows in ((-3, []), (5, [3, 4]), (2**31 - 1, [3, *range(4, 40)])):
        given = integers | {"count": torch.tensor(count).int()}
        found, _ = sparse_mlp(**on_device(given), activation="silu")
        assert_mlp(integers, floats, torch.tensor(rows, dtype=torch.int64), found, "silu")


def test_blocks_of_32():
    integers, floats = nested_inputs("opt", (41, 88, 1, 1, 20), replace(NESTED["int6"], block=32))
    found, _ = sparse_mlp(**on_device(integers), activation="relu")
    assert_mlp(integers, floats, integers["indices"][:20], found, "relu")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"w_up": torch.zeros(88, 40, dtype=torch.uint8)}, "w_up has rows of 40 bytes, and its copy 32"),
        ({"w_up": torch.zeros(87, 32, dtype=torch.uint8)}, "w_up has shape"),
        ({"w_down": torch.zeros(88, 41)}, "w_gate is a residual of a low-bit copy, and not all of"),
        ({"x": torch.zeros(1, 1, 41, dtype=torch.uint8)}, "x is torch.uint8"),
    ],
)
def test_what_is_refused(wrong, message):
    integers, _ = nested_inputs("llama", (41, 88, 1, 1, 3), NESTED["int8"])
    with pytest.raises(ValueError, match=message):
        sparse_mlp(**on_device(integers | wrong), activation="silu")


def test_a_residual_needs_its_copy():
    integers, _ = nested_inputs("llama", (41, 88, 1, 1, 3), NESTED["int8"])
    plain = {name: t for name, t in integers.items() if name[:2] not in ("c_", "cs") and name != "rest"}
    with pytest.raises(ValueError, match=r"w_gate is torch.uint8, expected torch.float32"):
        sparse_mlp(**on_device(plain), activation="silu")
