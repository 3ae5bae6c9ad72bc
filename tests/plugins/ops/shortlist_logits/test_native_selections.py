"""The native op with a shortlist for each row of x. What one row computes is tested in the other files."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from shadowllm.bundle.quantisation import NESTED
from shadowllm.plugins.ops.shortlist_logits.reference import shortlist_logits
from tests.plugins.native_model import built, ints, run_all
from tests.plugins.ops.shortlist_logits.table_inputs import nested_table, table_inputs
from tests.plugins.selections import assert_same_alone

pytestmark = built
WEIGHTS = ("table", "copy", "scales", "errors", "weighting", "table_scales")
ASKED = {"shortlist": ints(5, 10**6, 0, 87), "certify": ints(0, 0, 1, 1)}


def outputs(inputs, exact_copies):
    return run_all("ShortlistLogits", inputs, WEIGHTS, threads=2, exact_copies=exact_copies)


@pytest.mark.parametrize("exact_copies", [0, 1])
@pytest.mark.parametrize("nested", [False, True])
def test_a_row_has_the_same_bits_alone(nested, exact_copies, isa):
    inputs = table_inputs("normal", 1500, 4, 123)
    inputs = (nested_table(inputs, NESTED["int6"])[0] if nested else inputs) | ASKED
    assert_same_alone(partial(outputs, exact_copies=exact_copies), inputs, ("x", "shortlist", "certify"))


def test_the_result_is_that_of_the_reference(isa):
    inputs = table_inputs("normal", 1500, 4, 123) | ASKED
    for found, wanted in zip(outputs(inputs, 1), shortlist_logits(**inputs), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
