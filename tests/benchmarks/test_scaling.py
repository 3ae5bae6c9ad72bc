"""The scaling curve of learned selectors, on a tiny model."""

from __future__ import annotations

import json

import pytest
import torch

from shadowllm.benchmarks import scaling
from shadowllm.benchmarks.scaling import BUDGETS, Point, judge, text_windows, train
from shadowllm.bundle.predictor_file import Predictor
from shadowllm.errors import UserError
from shadowllm.models.registry import load_model
from shadowllm.predictor.tracefile import calibrate
from shadowllm.predictor.traces import Tracer
from shadowllm.predictor.train import train_static
from tests.tiny import split, token_windows

pytestmark = pytest.mark.slow


def test_points_are_read_and_nonsense_is_refused():
    assert Point.parse("layerwise:0.04:8192") == Point("layerwise", 0.04, 8192, "listnet")
    assert Point.parse("shadow:0.16:512:bce").file == "shadow-0.16-512-bce.safetensors"
    for text in ("static:0.04:8192", "shadow:0.04:8192:magic"):
        with pytest.raises(UserError, match="no network to train"):
            Point.parse(text)


def test_points_learn_side_by_side_and_are_judged_once(checkpoint, tmp_path):
    spec, stored, _ = load_model(checkpoint("llama-gqa"))
    weights, windows = stored.load(), token_windows(spec, n=48)
    traces = calibrate(spec, weights, split(windows[:8]), "f00d", limit_bytes=0)
    train_static(spec, traces, weights=weights).save(tmp_path / "static.safetensors")
    points = [Point.parse(text) for text in ("shadow:2:504", "layerwise:2:504", "layerwise:2:1008:weighted_bce")]
    train(spec, traces, points, Tracer(spec, weights, "l2norm"), windows, tmp_path)
    for point in points:
        predictor = Predictor.load(tmp_path / point.file)
        assert (predictor.kind, predictor.record["tokens"]) == (point.kind, point.tokens)
        assert predictor.record["cpu_seconds_per_token"].keys() == {"trace", "network"}
        assert min(predictor.record[name] for name in ("wall_seconds", "peak_rss_mb")) > 0
    evaluated = token_windows(spec, n=2, seed=9)
    found = judge(spec, weights, tmp_path, evaluated, {})
    names = {"static", "oracle", *(point.file.removesuffix(".safetensors") for point in points)}
    assert {(row["selector"], row["neuron_budget"]) for row in found["results"]} == {
        (name, budget) for name in names for budget in BUDGETS
    }
    closures = {row["selector"]: row["gap_closure"] for row in found["results"]}
    assert (closures["static"], closures["oracle"]) == (0, 1)
    again = judge(spec, weights, tmp_path, torch.zeros(0, 0), json.loads(json.dumps(found)))  # no pass without text
    assert again == json.loads(json.dumps(found))


def test_packages_add_their_docstrings(monkeypatch):
    monkeypatch.setattr(scaling, "documents", lambda: ["What every model reads. " * 50])
    alone, both = (text_windows(lambda text: list(text.encode()), 512, 0, names) for names in ((), ("pluggy",)))
    assert len(both) > len(alone)
    for name in ("no_such_package", "no_such_package.inside", "ast", ""):
        with pytest.raises(UserError, match=f"no package '{name}' is installed"):
            text_windows(list, 512, 0, [name])
