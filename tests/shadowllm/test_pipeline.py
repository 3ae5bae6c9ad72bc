"""Models whose heads are not selected (Qwen3): head budgets have no effect, and engines are refused."""

from __future__ import annotations

import pytest

from shadowllm.config import EngineOptions, Export, Source
from shadowllm.errors import UserError
from shadowllm.models.registry import load_model
from shadowllm.models.sparsity import Budget
from shadowllm.pipeline import build_engines, export_model
from tests.bundles import make_predictor


def test_a_head_budget_has_no_effect_and_a_warning(checkpoint, tmp_path):
    model = checkpoint("qwen3")
    spec, weights, _ = load_model(model)
    predictor = make_predictor(spec, weights.fingerprint())
    options = Export(budget=Budget(heads=0.25, neurons=0.5), rest="drop", validate=False)
    with pytest.warns(UserWarning, match="all heads of qwen3 models are active"):
        manifest = export_model(Source(str(model)), tmp_path / "out", options, predictor=predictor)
    counts = manifest.budget.counts(manifest.sparse_layers)
    assert counts.heads.tolist() == [spec.n_heads] * 2
    assert counts.neurons.tolist() == [spec.intermediate_size // 2] * 2


def test_engines_are_refused_by_name(bundle):
    pytest.importorskip("tensorrt_rtx", reason="engines need TensorRT (pip install '.[tensorrt-rtx]')")
    with pytest.raises(UserError, match="engines are not built of qwen3 models"):
        build_engines(bundle("qwen3"), EngineOptions("tensorrt_rtx"))
