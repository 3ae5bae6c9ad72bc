"""Memory of the low-bit copy: an output table, which can be the largest tensor, is converted a part at a time."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from shadowllm.bundle.certificate import copy_errors
from shadowllm.bundle.quantisation import NESTED, Quantisation, quantise, quantise_nested, quantised_copy, rounded
from shadowllm.bundle.quantised_tensors import CopyTensors, FloatRows, QuantisedTensors
from tests.allocations import Allocations

TABLE = "lm_head.weight"
FORMATS = {"float": None, "int8": Quantisation(8), "nested": NESTED["int8"]}


def weights(rows, width=64):
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(rows, width, generator=generator).half()
    return {TABLE: table, "final_norm.weight": torch.rand(width, generator=generator)}


@pytest.mark.parametrize("q", FORMATS.values(), ids=FORMATS)
def test_no_part_of_a_copy_needs_the_whole_table_in_float32(q, monkeypatch):
    monkeypatch.setattr("shadowllm.bundle.quantisation.CHUNK", 1 << 16)
    model = weights(1 << 16)
    parts = [f"copy.{TABLE}.{part}" for part in ("weighting", "errors") + (() if q == NESTED["int8"] else ("q",))]
    for name in parts:
        with Allocations() as made:
            found = CopyTensors(model, q)[name]
        assert made.largest(torch.float32) <= model[TABLE].numel() // 8
        tracemalloc.start()  # which sees the arrays of NumPy
        assert torch.equal(CopyTensors(model, q)[name], found)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 * model[TABLE].numel()


@pytest.mark.parametrize("q", FORMATS.values(), ids=FORMATS)
def test_parts_give_what_the_whole_table_gives(q, monkeypatch):
    model = weights(3000)
    rows = model[TABLE].float().numpy()
    rows = rows if q is None else rounded(rows, q)
    copy, scales = quantised_copy(rows, q)
    monkeypatch.setattr("shadowllm.bundle.quantisation.CHUNK", 1000)
    copies = CopyTensors(model, q)
    weighting = copies[f"copy.{TABLE}.weighting"].numpy()
    np.testing.assert_array_equal(copies[f"copy.{TABLE}.errors"], copy_errors(rows, copy, scales, weighting))
    if q != NESTED["int8"]:
        np.testing.assert_array_equal(copies[f"copy.{TABLE}.q"], copy)
        np.testing.assert_array_equal(copies[f"copy.{TABLE}.scales"], scales)


def test_integers_are_made_of_parts_of_a_matrix_and_of_its_transpose(monkeypatch):
    monkeypatch.setattr("shadowllm.bundle.quantisation.CHUNK", 1 << 14)
    name, tensor = "layers.0.down_proj.weight", weights(1 << 13)[TABLE]
    q = FORMATS["nested"]
    whole = [quantise_nested(values.float().contiguous().numpy(), q) for values in (tensor, tensor.T)]
    with Allocations() as made:
        stored = QuantisedTensors({name: tensor}, q)
        found = [[stored[f"{name}{t}.residual"], stored[f"copy.{name}{t}.q"]] for t in ("", ".T")]
    for (residual, copy), (wanted, _, low) in zip(found, whole, strict=True):
        np.testing.assert_array_equal(copy, wanted)
        np.testing.assert_array_equal(residual, low)
    assert made.largest(torch.float32) <= 1 << 14


def test_rows_are_rounded_to_the_types_of_the_bundle():
    tensor = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    q = Quantisation(4)
    for rows, wanted in (
        (FloatRows(tensor), tensor.numpy()),
        (FloatRows(tensor, torch.bfloat16), tensor.bfloat16().float().numpy()),
        (FloatRows(tensor, q=q), rounded(tensor.numpy(), q)),
    ):
        assert (rows.shape, len(rows)) == ((5, 64), 5)
        np.testing.assert_array_equal(rows[1:4], wanted[1:4])
    np.testing.assert_array_equal(quantise(FloatRows(tensor), q)[0], quantise(tensor.numpy(), q)[0])
