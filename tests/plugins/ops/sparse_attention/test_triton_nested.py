"""Compares the Triton kernels with float64 arithmetic where the full rows are nested integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from shadowllm.bundle.quantisation import NESTED, Quantisation
from shadowllm.plugins.ops.sparse_attention import reference
from shadowllm.plugins.ops.sparse_attention.launcher import sparse_attention
from tests.plugins.ops.sparse_attention.test_triton_rest import mixed_attention, rest_inputs
from tests.plugins.triton_ops import FORMATS, assert_as_exact_as, on_device, with_residuals

pytestmark = pytest.mark.slow

SIZES = [  # D, H, n_kv, d, C, B, S, count, rotated, biases, and groups of heads
    ((8, 3, 1, 5, 31, 1, 1, 1, False, False), 3),
    ((41, 6, 1, 10, 300, 1, 1, 5, True, True), 6),
    ((48, 4, 4, 12, 31, 1, 1, 0, False, True), 4),
    ((130, 9, 3, 8, 40, 1, 1, 9, True, True), 3),
    ((64, 3, 1, 64, 80, 3, 1, 2, True, False), 3),
    ((48, 6, 2, 8, 64, 2, 5, 4, True, True), 2),
    ((41, 4, 4, 20, 90, 1, 20, 2, False, True), 4),
]


def nested_inputs(
    case: tuple[tuple[int, ...], int], q: Quantisation, rest: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Any], dict[str, Any]]:
    return with_residuals(rest_inputs(*case, dtype, rest), q)


def assert_attention(integers: dict[str, Any], floats: dict[str, Any], heads: Tensor, found: Tensor, n: int) -> None:
    exact, own = (mixed_attention(floats, heads, n, kind) for kind in (torch.float64, floats["x"].dtype))
    assert_as_exact_as(found, own, exact)
    if found.dtype == torch.float32:
        numbers = {name: None if t is None else t.numpy() for name, t in integers.items()}
        given = numbers | {"indices": heads.int().numpy(), "count": len(heads)}
        assert_as_exact_as(torch.from_numpy(reference.sparse_attention(**given, n_heads=n)[0]), own, exact)


@FORMATS
@pytest.mark.parametrize(("place", "case"), list(enumerate(SIZES)), ids=str)
def test_attention(case, place, q):
    """With and without indices and a rest, by turns."""
    rest, inside, (size, _) = int(place % 3 != 0), place % 4 > 1, case
    integers, floats = nested_inputs(case, q, rest)
    chosen_by = {"indices": None} if inside else {}
    found, chosen = sparse_attention(**on_device(integers | chosen_by), n_heads=size[1])
    heads = integers["indices"] if chosen is None else chosen.cpu()
    assert_attention(integers, floats, heads[heads >= 0], found, size[1])


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [(1, 1), (3, 1), (1, 20)])
def test_sixteen_bits(tokens, dtype, q):
    integers, floats = nested_inputs(((48, 4, 2, 12, 31, *tokens, 3, True, True), 4), q, dtype=dtype)
    found, _ = sparse_attention(**on_device(integers), n_heads=4)
    assert_attention(integers, floats, integers["indices"][:3], found, 4)


@FORMATS
@pytest.mark.parametrize("seqlen", [1, 5])
def test_hostile_indices_and_counts_read_nothing_outside(seqlen, q):
    integers, floats = nested_inputs(((41, 4, 2, 12, 31, 1, seqlen, 4, True, True), 4), q, rest=0)
    integers["indices"] = torch.tensor([4, 1, -9, 2**31 - 1]).int()
    for count, heads in ((-3, []), (1, []), (2**31 - 1, [1])):
        given = integers | {"count": torch.tensor(count).int()}
        found, _ = sparse_attention(**on_device(given), n_heads=4)
        assert_attention(integers, floats, torch.tensor(heads, dtype=torch.int64), found, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"w_q": torch.zeros(48, 31, dtype=torch.uint8)}, "w_q has rows of 31 bytes, and its copy 32"),
        ({"w_o": torch.zeros(48, 41)}, "w_q is a residual of a low-bit copy, and not all of"),
    ],
)
def test_what_is_refused(wrong, message):
    integers, _ = nested_inputs(((41, 4, 2, 12, 31, 1, 1, 4, True, True), 4), NESTED["int8"])
    with pytest.raises(ValueError, match=message):
        sparse_attention(**on_device(integers | wrong), n_heads=4)
