"""Compares the Triton kernels with float64 arithmetic where the other heads come from a low-bit copy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from shadowllm.plugins.ops.sparse_attention import reference
from shadowllm.plugins.ops.sparse_attention.launcher import sparse_attention
from shadowllm.plugins.reference import copy_rows
from tests.plugins.ops.sparse_attention.test_triton import attention_inputs, dense_attention
from tests.plugins.ops.sparse_mlp.test_triton_rest import CALLS, low_bit
from tests.plugins.triton_ops import assert_as_exact_as, on_device

pytestmark = pytest.mark.slow

SIZES = [  # D, H, n_kv, d, C, B, S, count, rotated, biases, and groups of heads
    ((48, 4, 4, 12, 31, 1, 1, 1, False, True), 4),
    ((576, 9, 3, 64, 300, 1, 1, 3, True, False), 3),
    ((576, 9, 3, 64, 300, 1, 1, 5, True, False), 9),
    ((41, 6, 1, 10, 600, 1, 1, 5, True, True), 6),
    ((41, 3, 3, 7, 40, 1, 1, 0, False, False), 3),
    ((130, 20, 4, 8, 40, 1, 1, 20, True, True), 4),
    ((64, 9, 3, 64, 300, 3, 1, 6, True, False), 3),
    ((48, 6, 2, 8, 64, 2, 5, 4, True, True), 2),
    ((41, 4, 4, 20, 150, 1, 70, 2, False, True), 4),
    ((40, 2, 1, 5, 33, 2, 9, 0, False, True), 1),
]


def rest_inputs(size: tuple[int, ...], groups: int, dtype: torch.dtype, rest: int) -> dict[str, Tensor | None]:
    width = size[0]
    inputs = attention_inputs(size, dtype) | {"rest": torch.tensor(rest).int()}
    for part in ("q", "o"):
        inputs[f"c_{part}"], inputs[f"cs_{part}"] = low_bit(inputs[f"w_{part}"])
    generator = torch.Generator().manual_seed(width)
    scores = torch.randn(groups, width + 1, generator=generator)
    return inputs | {"score_weight": scores[:, :-1].contiguous(), "score_bias": scores[:, -1].contiguous()}


def mixed_attention(inputs: dict[str, Tensor | None], heads: Tensor, n_heads: int, dtype: torch.dtype) -> Tensor:
    """The op in plain PyTorch, in a given type."""
    full = torch.isin(torch.arange(n_heads), heads).repeat_interleave(inputs["key"].shape[-1])[:, None]
    rows = {}
    for part in ("q", "o"):
        weight, width = inputs[f"w_{part}"].double(), inputs["x"].shape[-1]
        copied = copy_rows(inputs[f"c_{part}"].numpy(), inputs[f"cs_{part}"].numpy(), width)
        rows[f"w_{part}"] = torch.where(full, weight, torch.from_numpy(copied).double())
    attended = torch.arange(n_heads) if int(inputs["rest"]) else heads[heads >= 0]
    listed = {"indices": F.pad(attended, (0, n_heads - len(attended)), value=-1).int()}
    plain = {name: inputs[name] for name in ("x", "key", "value", "lengths", "b_q", "b_o", "cos", "sin")}
    return dense_attention(plain | rows | listed | {"count": torch.tensor(len(attended))}, n_heads, dtype)


def best(inputs: dict[str, Tensor | None], n_heads: int) -> list[int]:
    """The heads that the reference chooses."""
    numbers = {
        name: None if t is None else t.float().numpy() if t.is_floating_point() else t.numpy()
        for name, t in inputs.items()
    }
    return reference.sparse_attention(**numbers, n_heads=n_heads)[1].tolist()


# The shapes of a real model take long in the interpreter, so each call has one of the two.
WIDE = [case for case in SIZES if case[0][0] == 576]
CASES = [
    pytest.param(*case, *call, id=f"{name}-{case[0]}-{case[1]}")
    for number, (name, call) in enumerate(CALLS.items())
    for case in SIZES
    if case not in WIDE or case is WIDE[number % 2]
]


@pytest.mark.parametrize(("size", "groups", "rest", "inside", "dtype"), CASES)
def test_attention_with_a_rest(size, groups, dtype, rest, inside):
    inputs, n_heads = rest_inputs(size, groups, dtype, rest), size[1]
    if inside:
        inputs["indices"] = None
    found, chosen = sparse_attention(**on_device(inputs), n_heads=n_heads)
    assert (chosen is not None) == inside
    if chosen is not None:
        assert chosen.tolist() == best(inputs, n_heads)
    heads = inputs["indices"] if chosen is None else chosen.cpu()
    exact = mixed_attention(inputs, heads, n_heads, torch.float64)
    assert_as_exact_as(found, mixed_attention(inputs, heads, n_heads, dtype), exact)


SIZE = (48, 4, 2, 12, 31)


@pytest.mark.parametrize("tokens", [(1, 1), (3, 1), (1, 5)])
@pytest.mark.parametrize(("count", "rest"), [(4, 1), (9, 1), (2, 0)])
def test_no_copy_is_read_where_it_adds_nothing(tokens, count, rest):
    inputs = rest_inputs((*SIZE, *tokens, 4, True, True), 4, torch.float32, rest)
    inputs |= {"indices": None, "count": torch.tensor(count).int()}
    clean, chosen = sparse_attention(**on_device(inputs), n_heads=4)
    for name in ("cs_q", "cs_o"):
        inputs[name] = torch.full_like(inputs[name], torch.nan)
    again, others = sparse_attention(**on_device(inputs), n_heads=4)
    assert torch.equal(clean, again)
    assert torch.equal(chosen, others)


def test_equal_scores_go_to_the_lower_heads():
    inputs = rest_inputs((*SIZE, 1, 1, 4, True, True), 4, torch.float32, 1)
    for name in ("score_weight", "score_bias"):
        inputs[name] = torch.zeros_like(inputs[name])
    inputs["score_bias"][2] = 1
    inputs |= {"indices": None, "count": torch.tensor(3).int()}
    assert sparse_attention(**on_device(inputs), n_heads=4)[1].tolist() == [0, 1, 2, -1]
    inputs["score_bias"][2] = float("nan")
    assert sparse_attention(**on_device(inputs), n_heads=4)[1].tolist() == [0, 1, 3, -1]


def test_whole_groups_are_chosen():
    inputs = rest_inputs((*SIZE, 1, 1, 4, True, True), 2, torch.float32, 1)
    for count, wanted in ((-1, 0), (0, 0), (1, 0), (2, 2), (3, 2), (4, 4), (5, 4)):
        inputs |= {"indices": None, "count": torch.tensor(count).int()}
        chosen = sparse_attention(**on_device(inputs), n_heads=4)[1]
        assert int((chosen >= 0).sum()) == wanted
        assert wanted != 2 or chosen.tolist() in ([0, 1, -1, -1], [2, 3, -1, -1])


@pytest.mark.parametrize("tokens", [(1, 1), (3, 1), (1, 5)])
def test_short_indices_may_be_given(tokens):
    inputs = rest_inputs((*SIZE, *tokens, 4, True, True), 4, torch.float32, 1)
    inputs |= {"indices": torch.tensor([2, 7, -1]).int(), "count": torch.tensor(2).int()}
    found, _ = sparse_attention(**on_device(inputs), n_heads=4)
    heads = torch.tensor([2])
    exact = mixed_attention(inputs, heads, 4, torch.float64)
    assert_as_exact_as(found, mixed_attention(inputs, heads, 4, torch.float32), exact)


def test_given_heads_need_no_copy_if_the_rest_is_dropped():
    inputs = rest_inputs((*SIZE, 3, 1, 2, True, True), 4, torch.float32, 0)
    inputs |= {name: torch.full_like(inputs[name], torch.nan) for name in ("cs_q", "cs_o")}
    found, _ = sparse_attention(**on_device(inputs), n_heads=4)
    plain = {name: t for name, t in inputs.items() if name.split("_")[0] not in ("c", "cs", "score", "rest")}
    assert torch.equal(found, sparse_attention(**on_device(plain), n_heads=4)[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rest": None}, "no rest"),
        ({"c_o": None, "cs_o": None}, "no c_o, cs_o"),
        ({"c_q": torch.zeros(48, 2, 32, dtype=torch.uint8)}, "c_q has shape"),
        ({"cs_o": torch.zeros(47, 1)}, "cs_o has shape"),
        ({"indices": None, "score_bias": None}, "needs indices"),
        ({"indices": None, "score_weight": torch.zeros(3, 48), "score_bias": torch.zeros(3)}, "in 3 groups"),
    ],
    ids=str,
)
def test_what_is_refused(wrong, message):
    inputs = rest_inputs((*SIZE, 1, 1, 2, True, True), 4, torch.float32, 1) | wrong
    with pytest.raises(ValueError, match=message):
        sparse_attention(**on_device(inputs), n_heads=4)
