"""Evaluation of a bundle with a low-bit copy over rests and shortlists."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from shadowllm.bundle.cost_model import Itemsizes, predictor_bytes, step_traffic
from shadowllm.bundle.manifest import read_manifest
from shadowllm.cli import main
from shadowllm.errors import UserError
from shadowllm.eval_config import Evaluation
from shadowllm.evaluation.quality_report import CONTEXT
from shadowllm.evaluation.sweep import evaluate_text
from shadowllm.models.sparsity import Budget

QUICK = {"texts": [__file__], "tokens": 64, "seqlen": 32}


def test_windows_are_as_long_as_the_model_reads(with_copies):
    positions = read_manifest(with_copies).spec.max_seqlen
    evaluated = evaluate_text(with_copies, Evaluation(**QUICK | {"tokens": 2 * positions, "seqlen": 2 * positions}))
    assert (evaluated.tokens, evaluated.seqlen) == (2 * positions, positions)


def test_the_bundles_own_budget_is_the_default(with_copies):
    manifest = read_manifest(with_copies)
    replace(manifest, budgets={"heads": 0.5, "neurons": 0.25, "shortlist": 20, "rest": None}).write(with_copies)
    evaluated = evaluate_text(with_copies, Evaluation(**QUICK))
    for row in evaluated.results[1:]:
        assert (row.head_budget, row.neuron_budget, row.shortlist, row.rest) == (0.5, 0.25, 20, "shadow")
    own = next(row for row in evaluated.to_dict()["results"] if row["selector"] == "quantized-shadow")
    active = Budget(heads=0.5, neurons=0.25).counts(manifest.sparse_layers)
    choosing = predictor_bytes(manifest, 4, "shadow")
    traffic = step_traffic(
        manifest.spec, Itemsizes.of(4), CONTEXT, active, choosing=choosing, rest="shadow", shortlist=20
    )
    assert own["bytes_per_token"] == traffic.total


def test_command(with_copies, tmp_path, capsys):
    report = tmp_path / "eval.json"
    text = ["--text", __file__, "--tokens", "64", "--seqlen", "32", "--selector", "static", "oracle", "--layers"]
    options = ["--rest", "shadow", "drop", "--shortlist", "10", "all", "--json", str(report)]
    figure = ["--plot", str(tmp_path / "eval.png")]
    assert main(["eval", str(with_copies), *text, *options, *figure]) == 0
    rows = json.loads(report.read_text())["results"]
    expected = [(rest, rows) for rest in ("shadow", "drop") for rows in (10, None)] * 2
    assert [(row["rest"], row["shortlist"]) for row in rows] == expected
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("rest", "shortlist", "shadow, 10 rows"))


def test_a_bundle_without_copies_shows_no_columns_of_them(bundle, capsys):
    text = ["--text", __file__, "--tokens", "64", "--seqlen", "32", "--selector", "static"]
    assert main(["eval", str(bundle()), *text]) == 0
    assert "shortlist" not in capsys.readouterr().out
    assert main(["eval", str(bundle()), *text, "--shortlist", "all"]) == 0
    with pytest.raises(UserError, match="no low-bit copy"):
        evaluate_text(bundle(), Evaluation(**QUICK, selectors=["static"], shortlist=[10]))
