"""The fit of what a selection costs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from shadowllm.benchmarks import selection_costs
from shadowllm.benchmarks.selection_costs import FITTED, features, fit
from shadowllm.bundle.manifest import read_manifest
from shadowllm.errors import UserError
from shadowllm.models.sparsity import Budget
from tests.plugins.native_model import built

MIXED = {"kind": "quantized-shadow", "rest": "shadow", "weight_dtype": "int8"}


def test_the_fit_finds_the_costs_of_exact_times():
    rng = np.random.default_rng(0)
    rows = rng.uniform(0, 1, (9, 5)) * (1e8, 6e7, 30, 30, 1e4)
    costs, rate = np.array([1.5, 2e6, 3e5, 900.0]), 4e-8
    times = rate * (rows[:, 0] + rows[:, 1:] @ costs)
    found = fit(rows, times)
    np.testing.assert_allclose([found[name] for name in FITTED], costs, rtol=1e-6)
    assert found["gigabytes_per_second"] == pytest.approx(1e-6 / rate)
    assert found["largest_error_ms"] < 1e-9


@built
def test_features(bundle):
    manifest = read_manifest(bundle("llama-blocks", **MIXED))
    spec, layers = manifest.spec, manifest.sparse_layers.count
    plain, copied, *others = features(manifest, Budget(), 8, 4)
    assert plain > 0
    assert [copied, *others] == [0, 0, 0, 0]
    _, table, *others = features(manifest, Budget(shortlist=9), 8, 4)
    assert table > 0
    assert others == [0, 0, 9]
    less, copied, *others = features(manifest, Budget(neurons=0.5), 8, 4)
    assert less < plain
    assert copied > 0
    assert others == [0, layers, layers * spec.intermediate_size // 2]


@built
def test_the_command_measures_a_bundle(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(selection_costs, "NEURONS", (0.25, 0.5, 1.0))
    monkeypatch.setattr(selection_costs, "SHORTLISTS", (None, 9))
    monkeypatch.setattr(selection_costs, "HEADS", (0.5,))
    out = tmp_path / "costs.json"
    options = ["--prompt-len", "4", "--new-tokens", "3", "--runs", "1", "--json", str(out)]
    selection_costs.main([str(bundle("llama-blocks", **MIXED)), *options])
    assert "copy_cost" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert len(record["results"]) == 7
    assert all(row["itl_ms"] > 0 for row in record["results"])


def test_steps_that_do_not_differ_are_refused():
    with pytest.raises(UserError, match="too similar"):
        fit([[100, 0, 0, 0, 0]] * 9, [1.0] * 9)


def test_a_bundle_without_a_copy_is_refused(bundle, capsys):
    assert selection_costs.main([str(bundle("opt"))]) == 1
    assert "has no low-bit copy" in capsys.readouterr().err
