"""Compares the Triton kernel with the reference: indices are equal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from shadowllm.plugins.ops.select_topk import reference
from shadowllm.plugins.ops.select_topk.launcher import select_topk
from tests.plugins.triton_ops import DEVICE

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("width", "counts"),
    [(1, [0, 1]), (7, [7, 3]), (41, [0, 7, 41]), (123, [1, 122, 61]), (1000, [999]), (65536, [8192, 65536])],
)
def test_against_the_reference(width, counts):
    scores = np.random.default_rng(width).standard_normal((len(counts), width)).astype(np.float32)
    check(scores, counts, width)


def test_ties_go_to_the_lower_index():
    check(np.array([[1, 2, 2, 1, 2, 1], [0, 0, 0, 0, 0, 0]], np.float32), [4, 3], 6)


def test_ties_in_rows_of_several_blocks():
    scores = np.random.default_rng(0).integers(-3, 3, (2, 40000)).astype(np.float32)
    check(scores, [12345, 39999], 40000)


def test_zeros_of_both_signs_infinities_and_nan():
    scores = np.array([[0.0, -0.0, np.inf, np.nan, -np.inf, -1e-38, 1e-38]], np.float32)
    for count in range(8):
        check(scores, [count], 7)


def test_capacity_below_the_row():
    check(np.arange(10, dtype=np.float32)[None], [2], 3)


def test_a_count_beyond_the_capacity_is_taken_for_it():
    scores = torch.arange(5, dtype=torch.float32, device=DEVICE)[None]
    for count, wanted in ((9, [2, 3, 4]), (-1, [-1, -1, -1])):
        assert select_topk(scores, torch.tensor([count], device=DEVICE).int(), 3).tolist() == [wanted]


def check(scores: np.ndarray, counts: list[int], cap: int) -> None:
    wanted = reference.select_topk(scores, np.array(counts), cap)
    found = select_topk(torch.from_numpy(scores).to(DEVICE), torch.tensor(counts, device=DEVICE).int(), cap)
    np.testing.assert_array_equal(found.cpu().numpy(), wanted)


def test_topk_refuses_more_than_there_are():
    with pytest.raises(ValueError, match="7 of 6"):
        select_topk(torch.zeros(1, 6, device=DEVICE), torch.tensor([1], device=DEVICE).int(), 7)
