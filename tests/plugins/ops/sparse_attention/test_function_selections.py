"""Compares the function body with the NumPy reference, with a selection for each sequence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shadowllm.bundle.quantisation import LOW_BIT_COPY
from shadowllm.plugins.ops.sparse_attention.reference import sparse_attention
from shadowllm.plugins.ops.sparse_attention.schema import SPARSE_ATTENTION
from tests.plugins.function_model import FORM, TOLERANCE, run_all
from tests.plugins.ops.sparse_attention.mixed_inputs import mixed_inputs
from tests.plugins.ops.sparse_attention.native_inputs import attention_inputs
from tests.plugins.selections import each_selects

SIZE = (41, 6, 2, 8, 33, 3, 2, (5, 31, 7), 0)
REST = replace(FORM, rest=LOW_BIT_COPY)
CASES = {
    "dropped": (FORM, attention_inputs("llama", SIZE), ()),
    "given": (REST, mixed_inputs("llama", SIZE), (1, 0, 1)),
    "chosen": (replace(REST, head_groups=3), mixed_inputs("llama", SIZE, groups=3), (1, 0, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_selection_for_each_sequence(name):
    form, inputs, rest = CASES[name]
    inputs = each_selects(inputs, (4, 6, 0), 6, rest)
    feeds = {key: value for key, value in inputs.items() if value is not None}
    found = run_all(SPARSE_ATTENTION, form, feeds, 1 + (inputs["indices"] is None), n_heads=6, layer=0)
    for one, other in zip(found, sparse_attention(**inputs, n_heads=6), strict=False):
        np.testing.assert_allclose(one, other, **TOLERANCE)
