"""Layers, rows and counts of budgets, with one fraction for all layers or one per layer."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from shadowllm.errors import UserError
from shadowllm.models.registry import load_model
from shadowllm.models.sparsity import (
    UNITS,
    Budget,
    SparseLayers,
    describe_fractions,
    format_fractions,
    layer_units,
    parse_fractions,
)


@pytest.fixture(scope="module")
def spec(checkpoint):
    return load_model(checkpoint("llama-gqa"))[0]  # 4 heads, 88 neurons


def sparse(spec, count):
    """Sparse layers of a model with one dense layer before them."""
    return SparseLayers(replace(spec, n_layers=count + 1), 1)


def lists(counts):
    return tuple(counts[unit].tolist() for unit in UNITS)


def test_sparse_layers_come_after_the_dense_ones(spec):
    layers = SparseLayers(replace(spec, n_layers=5), 2)
    assert (layers.count, list(layers.layers)) == (3, [2, 3, 4])
    assert [layers.row(layer) for layer in layers.layers] == [0, 1, 2]
    assert [layers.layer(row) for row in range(layers.count)] == [2, 3, 4]
    assert 1 not in layers.layers


def test_a_dense_model_has_none_and_takes_any_budget(spec):
    layers = SparseLayers(spec, spec.n_layers)
    assert (layers.count, list(layers.layers)) == (0, [])
    assert lists(Budget(heads=0.5, neurons=(0.25, 1.0)).counts(layers)) == ([], [])


def test_units_stand_in_one_order(spec):
    assert tuple(layer_units(spec).items()) == (("heads", 4), ("neurons", 88))
    assert tuple(layer_units(spec)) == UNITS == tuple(vars(Budget()))[:2]
    assert tuple(vars(Budget().counts(sparse(spec, 1)))) == UNITS


def test_counts_go_by_name_and_by_layer(spec):
    counts = Budget(heads=(0.25, 1.0), neurons=0.5).counts(sparse(spec, 2))
    assert counts["heads"] is counts.heads
    assert counts["neurons"] is counts.neurons
    assert list(counts.by_layer()) == [(1, 44), (4, 44)]
    assert all(type(number) is int for layer in counts.by_layer() for number in layer)


def test_budgets_have_no_positions():
    with pytest.raises(TypeError):
        Budget(0.5, 0.25)


def test_one_fraction_holds_for_all_layers(spec):
    counts = Budget(neurons=0.5, heads=0.75).counts(sparse(spec, 3))
    assert lists(counts) == ([3, 3, 3], [44, 44, 44])


def test_each_layer_may_have_its_own(spec):
    counts = Budget(neurons=(0.25, 1.0), heads=1e-9).counts(sparse(spec, 2))
    assert lists(counts) == ([1, 1], [22, 88])
    assert Budget(neurons=(0.25, 1.0)).mean() == Budget(neurons=0.625)
    with pytest.raises(UserError, match="2 fractions, the model 3 sparse layers"):
        Budget(neurons=(0.25, 1.0)).counts(sparse(spec, 3))


def test_kv_groups_stay_whole(spec):
    grouped = replace(spec, head_unit="kv_group")  # two groups of two
    counts = Budget(neurons=0.25, heads=(0.1, 0.8, 1.0)).counts(sparse(grouped, 3))
    assert (lists(counts), counts.heads.dtype) == (([2, 4, 4], [22, 22, 22]), np.int32)
    with pytest.raises(UserError, match="head unit 'layer'"):
        replace(spec, head_unit="layer")


@pytest.mark.parametrize("value", [0.0, 1.1, float("nan"), (0.5, 0.0), True, "0.5", None, ["0.5"], [True, 0.5]])
def test_only_fractions(value):
    with pytest.raises(UserError, match="the head budget"):
        Budget(heads=value)


@pytest.mark.parametrize("value", [1.5, True, "all"])
def test_only_whole_shortlists(value):
    with pytest.raises(UserError, match="no number of rows"):
        Budget(shortlist=value)


@pytest.mark.parametrize("value", [np.float32(0.5), np.array(0.5), [0.5, 0.25], np.array([0.5, 0.25])])
def test_numbers_of_other_packages(value):
    found = Budget(neurons=value).neurons
    assert found == (0.5 if np.ndim(value) == 0 else (0.5, 0.25))
    assert all(type(number) is float for number in (found if isinstance(found, tuple) else [found]))


def test_numbers_of_other_packages_are_stored_as_those_of_json():
    budget = Budget(neurons=(np.float32(0.5), Fraction(1, 4)), heads=np.float32(1), shortlist=np.int64(7))
    assert json.dumps(vars(budget)) == json.dumps(vars(Budget(neurons=(0.5, 0.25), heads=1.0, shortlist=7)))


@pytest.mark.parametrize("value", [0.5, (0.25, 1.0)])
def test_text_and_back(value):
    assert parse_fractions(format_fractions(value)) == value
    assert Budget(neurons=list(value) if isinstance(value, tuple) else value).neurons == value


def test_description():
    assert describe_fractions(0.5) == "50%"
    assert describe_fractions((0.25, 1.0)) == "62% (25% to 100%, layer by layer)"


@pytest.mark.parametrize("value", ["x", 1, None])
def test_a_certificate_is_asked_for_or_not(value):
    with pytest.raises(UserError, match="certify is"):
        Budget(certify=value)
