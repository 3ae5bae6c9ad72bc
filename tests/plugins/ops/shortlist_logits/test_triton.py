"""Compares the Triton kernels with the NumPy reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from shadowllm.plugins.ops.shortlist_logits import reference
from shadowllm.plugins.ops.shortlist_logits.launcher import shortlist_logits
from tests.plugins.ops.shortlist_logits.table_inputs import (
    KINDS,
    assert_certified,
    error_scale,
    exact_logits,
    nested_table,
    table_inputs,
    with_counts,
)
from tests.plugins.triton_ops import DEVICE, FORMATS, with_types

pytestmark = pytest.mark.slow

SIZES = [(1, 1, 41), (7, 1, 64), (123, 3, 123), (200, 1, 576), (41, 17, 41)]  # V, R, D


def tensors(inputs, dtype=torch.float32):
    found = {}
    for name, value in inputs.items():
        tensor = None if value is None else torch.from_numpy(value).to(DEVICE)
        found[name] = tensor.to(dtype) if name in ("x", "table") and value.dtype != np.uint8 else tensor
    return found


def outputs(inputs, dtype=torch.float32):
    """The outputs as arrays, and the inputs with x and the table rounded to the type."""
    given = tensors(inputs, dtype)
    logits, recomputed = shortlist_logits(**given)
    kinds = {name: inputs[name].dtype for name in ("x", "table")}
    rounded = inputs | {name: given[name].float().cpu().numpy().astype(kind) for name, kind in kinds.items()}
    return logits.cpu().numpy(), recomputed.cpu().numpy(), rounded


@pytest.mark.parametrize(("size", "shortlist", "dtype"), with_types(SIZES, [0, 5, 40, 10**6]))
def test_the_best_rows_are_exact(size, shortlist, dtype):
    inputs = with_counts(table_inputs("normal", *size), shortlist, certify=False)
    logits, recomputed, rounded = outputs(inputs, dtype)
    wanted, counts = reference.shortlist_logits(**rounded)
    assert (np.abs(logits - wanted) <= 1e-5 * error_scale(rounded)).all()
    np.testing.assert_array_equal(recomputed, counts)


@FORMATS
@pytest.mark.parametrize(("size", "shortlist", "dtype"), with_types([*SIZES[:3], (41, 17, 8)], [5, 10**6]))
def test_a_table_of_nested_integers(size, shortlist, dtype, q):
    integers, _ = nested_table(table_inputs("normal", *size), q)
    logits, recomputed, rounded = outputs(with_counts(integers, shortlist, certify=False), dtype)
    wanted, counts = reference.shortlist_logits(**rounded)
    assert (np.abs(logits - wanted) <= 1e-5 * error_scale(rounded)).all()
    np.testing.assert_array_equal(recomputed, counts)


@FORMATS
@pytest.mark.parametrize("kind", ["alike", "outlier"])
def test_a_certified_logit_is_the_largest_of_a_nested_table(kind, q):
    integers, floats = (with_counts(one, 3, certify=True) for one in nested_table(table_inputs(kind, 88, 3, 123), q))
    logits, recomputed, _ = outputs(integers)
    assert_certified(floats, logits)
    wanted = reference.shortlist_logits(**integers)[1]
    assert (np.abs(recomputed - wanted) <= 1 + 0.01 * wanted).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [(88, 3, 123), (1, 1, 41)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_certified_logit_is_the_largest_of_the_table(kind, size, weighted):
    inputs = with_counts(table_inputs(kind, *size, weighted=weighted), 3, certify=True)
    logits, recomputed, _ = outputs(inputs)
    assert_certified(inputs, logits)
    wanted = reference.shortlist_logits(**inputs)[1]
    assert (np.abs(recomputed - wanted) <= 1 + 0.01 * wanted).all()


def test_ties_go_to_the_lower_row():
    inputs = with_counts(table_inputs("normal", 88, 1, 64), 5, certify=False)
    inputs["copy"][:], inputs["scales"][:] = inputs["copy"][0], inputs["scales"][0]
    logits, recomputed, _ = outputs(inputs)
    assert (np.abs(logits - exact_logits(inputs))[0, :5] <= 1e-5).all()
    assert (logits[0, 5:] == logits[0, 5]).all()
    assert recomputed.tolist() == [5]


def test_the_copy_is_not_read_if_all_rows_are_exact():
    inputs = with_counts(table_inputs("normal", 88, 3, 41), 88, certify=True)
    inputs["scales"][:] = np.nan
    logits, recomputed, _ = outputs(inputs)
    assert (np.abs(logits - exact_logits(inputs)) <= 1e-6 * error_scale(inputs)).all()
    assert recomputed.tolist() == [88] * 3


def test_a_negative_shortlist_is_taken_for_none():
    inputs = table_inputs("normal", 88, 1, 41)
    below, none = (outputs(with_counts(inputs, n, certify=False)) for n in (-5, 0))
    np.testing.assert_array_equal(below[0], none[0])
    assert below[1].tolist() == [0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_not_hidden(value):
    inputs = with_counts(table_inputs("normal", 88, 1, 64), 5, certify=True)
    inputs["x"][0, 7] = value
    with np.errstate(invalid="ignore", over="ignore"):
        logits, recomputed, _ = outputs(inputs)
    assert not np.isfinite(logits).any()
    assert recomputed.tolist() == [88]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"x": torch.ones(1, 193)}, "for x"),
        ({"copy": torch.zeros(88, 1, 24, dtype=torch.uint8)}, "for x"),
        ({"copy": torch.zeros(88, 1, 32, dtype=torch.int8)}, "copy is torch.int8"),
        ({"errors": torch.ones(87)}, "errors has shape"),
        ({"weighting": torch.ones(40)}, "weighting has shape"),
        ({"shortlist": torch.tensor([1]).int()}, "shortlist has shape"),
    ],
    ids=str,
)
def test_what_no_logits_come_of(wrong, match):
    inputs = tensors(with_counts(table_inputs("normal", 88, 1, 41), 5, certify=False))
    with pytest.raises(ValueError, match=match):
        shortlist_logits(**inputs | {name: tensor.to(DEVICE) for name, tensor in wrong.items()})
