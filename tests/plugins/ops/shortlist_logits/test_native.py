"""Compares the native op with the reference and with float64 arithmetic; see `native_model`."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.bundle.certificate import ROUNDING, copy_errors
from shadowllm.bundle.quantisation import NESTED, Quantisation, dequantise, quantise
from shadowllm.plugins.ops.shortlist_logits.reference import shortlist_logits
from shadowllm.plugins.reference import copy_rows
from tests.plugins.native_model import STORED, built, run_all
from tests.plugins.ops.shortlist_logits.table_inputs import (
    KINDS,
    SHORTLISTS,
    SIZES,
    assert_certified,
    error_scale,
    exact_logits,
    nested_table,
    table_inputs,
    with_counts,
)

pytestmark = built

WEIGHTS = ("table", "copy", "scales", "errors", "weighting", "table_scales")


def outputs(inputs, threads=2, exact_copies=1):
    """By default x is not rounded to 8 bits for the copy, as in a validation."""
    return run_all("ShortlistLogits", inputs, WEIGHTS, threads=threads, exact_copies=exact_copies)


def low_logits(inputs):
    """The products from the copy, in float64."""
    rows = copy_rows(inputs["copy"], inputs["scales"], inputs["x"].shape[1])
    return inputs["x"].astype(np.float64) @ rows.astype(np.float64).T


@pytest.mark.parametrize("shortlist", SHORTLISTS)
@pytest.mark.parametrize("size", [*SIZES, (2000, 37, 64), (88, 0, 41)], ids=str)
def test_the_best_rows_are_exact(size, shortlist, isa):
    inputs = with_counts(table_inputs("normal", *size), shortlist, certify=False)
    logits, recomputed = outputs(inputs)
    rows, tokens, _ = size
    assert recomputed.tolist() == [min(shortlist, rows)] * tokens
    assert logits.shape == (tokens, rows)
    exact, low, scale = exact_logits(inputs), low_logits(inputs), error_scale(inputs)
    order = np.argsort(-low, axis=1, kind="stable")[:, :shortlist]
    listed = np.zeros(low.shape, dtype=bool)
    np.put_along_axis(listed, order, values=True, axis=1)
    wanted = np.where(listed, exact, low)
    assert (np.abs(logits - wanted) <= 1e-4 * scale).all()
    assert (np.abs(logits - exact)[listed] <= 1e-6 * scale.max(initial=0)).all()


@pytest.mark.parametrize("shortlist", [0, 5])
@pytest.mark.parametrize("size", [(513, 1, 576), (88, 1, 41), (513, 3, 123)], ids=str)
def test_x_is_rounded_to_8_bits_for_the_copy(size, shortlist, isa):
    """Every element of x moves by at most half a step, which is the largest element of its block / 127."""
    inputs = with_counts(table_inputs("normal", *size), shortlist, certify=False)
    logits = outputs(inputs, exact_copies=0)[0]
    width, x = size[2], inputs["x"]
    rows = np.abs(copy_rows(inputs["copy"], inputs["scales"], width))
    blocks = [slice(start, start + 64) for start in range(0, width, 64)]
    bound = sum(np.abs(x[:, b]).max(axis=1)[:, None] / 254 * rows[:, b].sum(axis=1)[None] for b in blocks)
    exact, low = exact_logits(inputs), low_logits(inputs)
    error = np.minimum(np.abs(logits - exact), np.abs(logits - low))
    assert (error <= bound + 1e-4 * error_scale(inputs)).all()
    assert ((np.abs(logits - exact) <= 1e-6 * error_scale(inputs)).sum(axis=1) >= shortlist).all()


@pytest.mark.parametrize("shortlist", [5, 600])
@pytest.mark.parametrize("certify", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_table_of_integers(bits, certify, shortlist, isa):
    inputs = with_counts(table_inputs("normal", 513, 1, 128), shortlist, certify=certify)
    data, scales = quantise(inputs["table"], Quantisation(bits))
    rounded = dequantise(data, scales, 128, Quantisation(bits))
    inputs["errors"] = copy_errors(rounded, inputs["copy"], inputs["scales"])
    wanted, counts = shortlist_logits(**inputs | {"table": rounded})
    logits, recomputed = outputs(inputs | {"table": data, "table_scales": scales})
    assert abs(int(recomputed[0]) - int(counts[0])) <= (2 if certify else 0)
    assert logits.argmax() == wanted.argmax()
    assert np.abs(logits.max() - wanted.max()) <= 1e-4 * error_scale(inputs).max()


@pytest.mark.parametrize("q", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("shortlist", [0, 5, 600])
@pytest.mark.parametrize("certify", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(1, 576), (3, 123)])
def test_a_nested_table(q, shortlist, certify, tokens, width, isa):
    made = nested_table(with_counts(table_inputs("normal", 513, tokens, width), shortlist, certify=certify), q)
    nested, floats = made
    (logits, recomputed), (wanted, counts) = outputs(nested), shortlist_logits(**floats)
    assert (np.abs(recomputed - counts) <= (2 if certify else 0)).all()
    different = np.abs(logits - wanted) > 1e-5 * error_scale(floats)  # only one side recomputed these rows
    assert (different.sum(axis=1) <= np.abs(recomputed - counts)).all()
    if certify:
        assert_certified(floats, logits)


@pytest.mark.parametrize("q", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("shortlist", [0, 5, 600])
def test_x_is_rounded_to_8_bits_for_residuals_too(q, shortlist, isa):
    made = nested_table(with_counts(table_inputs("normal", 513, 1, 576), shortlist, certify=False), q)
    nested, floats = made
    logits, x, rows = outputs(nested, exact_copies=0)[0], floats["x"], np.abs(floats["table"])
    rows = np.maximum(rows, np.abs(copy_rows(floats["copy"], floats["scales"], 576)))
    bound = np.repeat(np.abs(x).reshape(9, 64).max(axis=1), 64) / 254 @ rows.T
    nearest = np.minimum(np.abs(logits - exact_logits(floats)), np.abs(logits - low_logits(floats)))
    assert (nearest <= bound + 1e-4 * error_scale(floats)).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shortlist", [0, 64])
@pytest.mark.parametrize("size", SIZES[1:4], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_certified_logit_is_the_largest_of_the_table(kind, size, shortlist, weighted, isa):
    inputs = with_counts(table_inputs(kind, *size, weighted=weighted), shortlist, certify=True)
    logits, recomputed = outputs(inputs)
    assert_certified(inputs, logits)
    exact = exact_logits(inputs)
    for row in range(len(logits)):
        is_exact = np.abs(logits[row] - exact[row]) <= 1e-6 * error_scale(inputs)[row]
        assert is_exact.sum() >= recomputed[row]
    # A kernel may round x to 16 bits, and needs a few more rows then.
    wanted = shortlist_logits(**inputs)[1]
    assert (recomputed >= 0.99 * wanted - 1).all()
    if kind == "normal":
        assert (recomputed <= 1.02 * wanted + 2).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_the_copy_are_as_exact_as_the_bound_assumes(kind, weighted, isa):
    """Rounding x moves no product by more than the part of the errors that is for it; see ``native.cpp``."""
    inputs = with_counts(table_inputs(kind, 513, 1, 576, weighted), 0, certify=False)
    rows = copy_rows(inputs["copy"], inputs["scales"], 576).astype(np.float64)
    weights = (inputs["weighting"] if weighted else np.ones(576)).astype(np.float64)
    x = inputs["x"][0].astype(np.float64)
    most = np.repeat(np.abs(x).reshape(-1, 64).max(axis=1), 64)
    step = np.linalg.norm(most * weights) / 2**15
    allowed = np.linalg.norm(rows / weights, axis=1) * (step + ROUNDING / 2 * np.linalg.norm(x * weights))
    assert (np.abs(outputs(inputs)[0][0] - rows @ x) <= allowed).all()


def test_a_rounding_that_decides_is_in_the_bound(isa):
    """Rows that differ from their copy by nothing, and from one another by less than x is rounded."""
    width = 64
    copy = np.full((9, 1, 32), 0x99, np.uint8)  # all elements are 1
    scales = np.linspace(1, 1 + 1e-5, 9, dtype=np.float32)[:, None]
    table = copy_rows(copy, scales, width)
    x = np.random.default_rng(0).standard_normal((1, width)).astype(np.float32)
    x[0, 0] = 1e4
    inputs = {"x": x, "table": table, "copy": copy, "scales": scales, "errors": copy_errors(table, copy, scales)}
    assert_certified(inputs, outputs(with_counts(inputs, 1, certify=True))[0])


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("shortlist", [5, 600])
def test_a_table_of_two_bytes(dtype, shortlist, isa):
    inputs = with_counts(table_inputs("normal", 513, 1, 123), shortlist, certify=True)
    inputs["table"] = inputs["table"].astype(STORED[dtype])
    inputs["errors"] = copy_errors(inputs["table"], inputs["copy"], inputs["scales"])
    logits, recomputed = outputs(inputs)
    wanted, counts = shortlist_logits(**inputs)
    assert_certified(inputs, logits)
    assert abs(int(recomputed[0]) - int(counts[0])) <= 2
    assert np.abs(logits.max() - wanted.max()) <= 1e-6 * error_scale(inputs).max()


def test_ties_go_to_the_lower_row(isa):
    inputs = with_counts(table_inputs("normal", 88, 1, 64), 5, certify=False)
    inputs["copy"][:], inputs["scales"][:] = inputs["copy"][0], inputs["scales"][0]
    logits, _ = outputs(inputs)
    assert (np.abs(logits - exact_logits(inputs))[0, :5] <= 1e-5).all()
    assert (logits[0, 5:] == logits[0, 5]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_not_hidden(value, isa):
    inputs = with_counts(table_inputs("normal", 88, 1, 64), 5, certify=True)
    inputs["x"][0, 7] = value
    with np.errstate(invalid="ignore"):
        logits, recomputed = outputs(inputs)
    assert not np.isfinite(logits).any()
    assert recomputed.tolist() == [88]


def test_the_copy_is_not_read_if_all_rows_are_exact():
    inputs = with_counts(table_inputs("normal", 88, 3, 41), 88, certify=True)
    inputs["scales"][:] = np.nan
    logits, recomputed = outputs(inputs)
    assert (np.abs(logits - exact_logits(inputs)) <= 1e-6 * error_scale(inputs)).all()
    assert recomputed.tolist() == [88] * 3


def test_threads_do_not_change_a_bit():
    inputs = with_counts(table_inputs("normal", 5000, 2, 576), 100, certify=True)
    for one, two in zip(outputs(inputs, threads=1), outputs(inputs, threads=2), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("exact", [0, 1])
@pytest.mark.parametrize(("rows", "tokens", "width"), [(513, 1, 123), (88, 3, 576), (5000, 20, 576)])
def test_inputs_that_are_no_initializers(rows, tokens, width, exact, isa):
    """Only of a constant copy are there tiles, in which whole groups of rows are read."""
    inputs = with_counts(table_inputs("normal", rows, tokens, width, weighted=True), 7, certify=bool(exact))
    fed = run_all("ShortlistLogits", inputs, exact_copies=exact)
    for one, two in zip(fed, outputs(inputs, exact_copies=exact), strict=True):
        np.testing.assert_array_equal(one, two)
