"""Compares the function body with the NumPy reference, with a selection for each sequence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shadowllm.bundle.quantisation import LOW_BIT_COPY
from shadowllm.plugins.ops.sparse_mlp.reference import sparse_mlp
from shadowllm.plugins.ops.sparse_mlp.schema import SPARSE_MLP
from tests.plugins.function_model import FORM, TOLERANCE, run_all
from tests.plugins.native_model import ints
from tests.plugins.ops.sparse_mlp.gate_first_inputs import gate_first_inputs
from tests.plugins.ops.sparse_mlp.mixed_inputs import mixed_inputs
from tests.plugins.ops.sparse_mlp.native_inputs import mlp_inputs
from tests.plugins.selections import each_selects

SIZE = (41, 88, 3, 2, 0)
REST = replace(FORM, rest=LOW_BIT_COPY)
CASES = {
    "dropped": (FORM, mlp_inputs("llama", SIZE), ()),
    "given": (REST, mixed_inputs("llama", SIZE, choosing=False), (1, 0, 1)),
    "chosen": (replace(REST, chooses_neurons=True), mixed_inputs("llama", SIZE), (1, 0, 1)),
    "gate first": (
        replace(FORM, activation="relu", gate_first=True),
        gate_first_inputs("relu-gated", SIZE[:4]),
        (),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_selection_for_each_sequence(name):
    form, inputs, rest = CASES[name]
    inputs = each_selects(inputs, (41, 88, 0), 88, rest)
    feeds = {key: value for key, value in inputs.items() if value is not None}
    listed = inputs["indices"] is None
    found = run_all(SPARSE_MLP, form, feeds, 1 + listed, activation=form.activation, layer=0)
    expected = sparse_mlp(**inputs, activation=form.activation)
    for one, other in zip(found, expected, strict=False):
        np.testing.assert_allclose(one, other, **TOLERANCE | {"atol": 2e-5 * np.abs(other).max()})


def test_one_count_of_one_dimension_is_a_selection():
    inputs = {key: value for key, value in mixed_inputs("llama", (41, 7, 1, 1, 0)).items() if value is not None}
    form = replace(REST, chooses_neurons=True)
    _, chosen = run_all(SPARSE_MLP, form, inputs | {"count": ints(2)}, activation="silu", layer=0)
    assert chosen.shape == (1, 7)
    assert (chosen[0] >= 0).sum() == 2
