"""Compares the function body on ONNX Runtime with the NumPy reference, at awkward sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shadowllm.bundle.quantisation import LOW_BIT_COPY, NESTED
from shadowllm.plugins.function_body import TableForm
from shadowllm.plugins.ops.shortlist_logits.reference import shortlist_logits
from shadowllm.plugins.ops.shortlist_logits.schema import SHORTLIST_LOGITS
from tests.plugins.function_model import FORM, run_all
from tests.plugins.ops.shortlist_logits.table_inputs import (
    KINDS,
    SHORTLISTS,
    SIZES,
    assert_certified,
    error_scale,
    nested_table,
    table_inputs,
    with_counts,
)


def outputs(inputs, quantisation=None):
    rows, width = len(inputs["table"]), inputs["x"].shape[1]
    table = TableForm(width, rows, LOW_BIT_COPY, weighted=inputs["weighting"] is not None)
    feeds = {name: value for name, value in inputs.items() if value is not None}
    return run_all(SHORTLIST_LOGITS, replace(FORM, table=table, quantisation=quantisation), feeds)


@pytest.mark.parametrize("certify", [False, True])
@pytest.mark.parametrize("shortlist", SHORTLISTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_the_reference(size, shortlist, certify):
    inputs = with_counts(table_inputs("normal", *size, weighted=shortlist == 5), shortlist, certify=certify)
    logits, recomputed = outputs(inputs)
    wanted, counts = shortlist_logits(**inputs)
    np.testing.assert_allclose(logits, wanted, atol=1e-5, rtol=1e-4)
    np.testing.assert_array_equal(recomputed, counts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_certified_logit_is_the_largest_of_the_table(kind):
    inputs = with_counts(table_inputs(kind, 513, 3, 123, weighted=True), 3, certify=True)
    assert_certified(inputs, outputs(inputs)[0])


def test_a_table_of_two_bytes():
    inputs = with_counts(table_inputs("normal", 513, 3, 123), 64, certify=False)
    inputs["table"] = inputs["table"].astype(np.float16)
    logits, _ = outputs(inputs)
    assert (np.abs(logits - shortlist_logits(**inputs)[0]) <= 1e-5 * error_scale(inputs)).all()


@pytest.mark.parametrize("q", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize(("shortlist", "certify"), [(0, False), (7, False), (7, True), (600, False)])
def test_a_nested_table(q, shortlist, certify):
    nested, floats = nested_table(with_counts(table_inputs("normal", 513, 3, 123), shortlist, certify=certify), q)
    logits, recomputed = outputs(nested, q)
    for inputs in (nested, floats):
        wanted, counts = shortlist_logits(**inputs)
        np.testing.assert_allclose(logits, wanted, atol=1e-5, rtol=1e-4)
        np.testing.assert_array_equal(recomputed, counts)


def test_a_shortlist_for_each_row():
    asked = {"certify": np.array([0, 0, 1, 0], np.int32)}
    for shortlist in ([3, 0, 7, 600], [3, 0, 7, 5]):  # with and without a row that takes the whole table
        inputs = table_inputs("normal", 513, 4, 123) | asked | {"shortlist": np.array(shortlist, np.int32)}
        for found, wanted in zip(outputs(inputs), shortlist_logits(**inputs), strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-4)
        asked = {"certify": np.zeros(4, np.int32)}
