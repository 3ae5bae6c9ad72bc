"""Budgets: fractions to counts, one for all layers or one for each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shadowllm.errors import UserError
from shadowllm.models.registry import load_model
from shadowllm.models.sparsity import Budget, describe_fractions, format_fractions, parse_fractions


@pytest.fixture(scope="module")
def spec(checkpoint):
    return load_model(checkpoint("llama-gqa"))[0]  # 4 heads, 88 neurons


def test_one_fraction_holds_for_all_layers(spec):
    heads, neurons = Budget(neurons=0.5, heads=0.75).counts(spec, 3)
    assert (heads.tolist(), neurons.tolist()) == ([3, 3, 3], [44, 44, 44])


def test_each_layer_may_have_its_own(spec):
    heads, neurons = Budget(neurons=(0.25, 1.0), heads=1e-9).counts(spec, 2)
    assert (heads.tolist(), neurons.tolist()) == ([1, 1], [22, 88])
    assert Budget(neurons=(0.25, 1.0)).mean() == Budget(neurons=0.625)
    with pytest.raises(UserError, match="2 fractions, the model 3 sparse layers"):
        Budget(neurons=(0.25, 1.0)).counts(spec, 3)


def test_kv_groups_stay_whole(spec):
    grouped = replace(spec, head_unit="kv_group")  # two groups of two
    heads, neurons = Budget(neurons=0.25, heads=(0.1, 0.8, 1.0)).counts(grouped, 3)
    assert (heads.tolist(), heads.dtype, neurons.tolist()) == ([2, 4, 4], np.int32, [22, 22, 22])
    with pytest.raises(UserError, match="head unit 'layer'"):
        replace(spec, head_unit="layer")


@pytest.mark.parametrize("value", [0.0, 1.1, float("nan"), (0.5, 0.0)])
def test_only_fractions(value):
    with pytest.raises(UserError, match="the head budget"):
        Budget(heads=value)


@pytest.mark.parametrize("value", [0.5, (0.25, 1.0)])
def test_text_and_back(value):
    assert parse_fractions(format_fractions(value)) == value
    assert Budget(neurons=list(value) if isinstance(value, tuple) else value).neurons == value


def test_description():
    assert describe_fractions(0.5) == "50%"
    assert describe_fractions((0.25, 1.0)) == "62% (25% to 100%, layer by layer)"
