"""The cost of an export, on tiny models; and random models with published configurations."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from shadowllm.benchmarks import export_cost, random_model
from shadowllm.models.registry import load_model

TINY = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"vocab_size": 97, "head_dim": 12}


@pytest.mark.parametrize("name", random_model.PUBLISHED)
def test_published_configurations_are_read(monkeypatch, tmp_path, name):
    monkeypatch.setitem(random_model.ALL_SHAPES, name, random_model.PUBLISHED[name] | TINY)
    random_model.write_random_model(name, tmp_path)
    spec, weights, _ = load_model(tmp_path)
    published = random_model.PUBLISHED[name]
    assert spec.family == published["model_type"]
    assert spec.activation == published.get("hidden_act", "silu")
    assert spec.activation_threshold == published.get("hidden_act_param", 0)
    assert {name for name in weights if weights[name].numel()} == set(weights)


@pytest.mark.slow
def test_tiny_models(monkeypatch, tmp_path):
    result = tmp_path / "cost.json"
    monkeypatch.setitem(random_model.ALL_SHAPES, "qwen3-0.6b", random_model.PUBLISHED["qwen3-0.6b"] | TINY)
    argv = ["--shape", "tiny-llama", "qwen3-0.6b", "--dtype", "fp16", "--engine", "tensorrt_rtx", "--json", str(result)]
    monkeypatch.setattr(sys, "argv", ["export_cost", *argv])
    ballast = np.ones(1 << 30, dtype=np.uint8)  # of this process: the peak is that of the export alone
    export_cost.main()
    found, normed = json.loads(result.read_text())["results"]
    assert found["engine"]["engines_mb"] > 0 < found["engine"]["seconds"]
    assert "qwen3" in normed["engine"]["refused"]
    assert normed["decoded"] == export_cost.NEW_TOKENS
    assert found["peak_over_weights"] == pytest.approx(found["peak_rss_mb"] / found["weights_mb"])
    # Libraries are nearly everything that a tiny model needs.
    assert abs(found["peak_rss_mb"] - found["libraries_mb"]) < 0.2 * found["libraries_mb"]
    assert 50 < found["libraries_mb"] < ballast.nbytes / 1e6
    assert found["rest_over_weights"] < found["peak_over_weights"]
    assert found["decoded"] == export_cost.NEW_TOKENS
