"""Steps of an export: models whose heads are not selected (Qwen3), and networks that are imported."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shadowllm import pipeline
from shadowllm.config import Calibration, EngineOptions, Export, Source, TrainConfig
from shadowllm.errors import UserError
from shadowllm.models.registry import load_model
from shadowllm.models.sparsity import Budget
from shadowllm.pipeline import build_engines, export_model
from tests.bundles import BUDGET, make_predictor
from tests.predictor.test_powerinfer import networks, written


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


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_engines_of_integers_in_one_part_are_refused_by_name(bundle, checkpoint, tmp_path, weight_dtype):
    """Before anything else is done."""
    pytest.importorskip("tensorrt_rtx", reason="engines need TensorRT (pip install '.[tensorrt-rtx]')")
    words = f"not built of {weight_dtype} weights without a low-bit copy; export without --weight-dtype, or with int8"
    with pytest.raises(UserError, match=words):
        build_engines(bundle("llama-blocks", weight_dtype=weight_dtype), EngineOptions("tensorrt_rtx"))
    options = Export(weight_dtype=weight_dtype, rest="drop", engines=(EngineOptions("tensorrt_rtx"),))
    with pytest.raises(UserError, match=words):
        export_model(Source(str(checkpoint("llama-blocks"))), tmp_path / "out", options)


def test_a_given_relu_predictor_decides_before_the_work(checkpoint, tmp_path):
    """It has no low-bit copy, so integers cannot become an engine, whatever the options say about the rest."""
    pytest.importorskip("tensorrt_rtx", reason="engines need TensorRT (pip install '.[tensorrt-rtx]')")
    model = checkpoint("llama-blocks-relu")
    spec, weights, _ = load_model(model)
    predictor = make_predictor(spec, weights.fingerprint(), "relu")
    options = Export(weight_dtype="int8", engines=(EngineOptions("tensorrt_rtx"),))
    with pytest.raises(UserError, match="not built of int8 weights"):
        export_model(Source(str(model)), tmp_path / "out", options, predictor=predictor)
    with pytest.raises(UserError, match="use --weight-dtype int8, or --rest shadow"):
        export_model(Source(str(model)), tmp_path / "out", replace(options, weight_dtype="int6"), predictor=predictor)


@pytest.mark.slow
def test_networks_of_powerinfer_make_a_layerwise_bundle(checkpoint, tmp_path):
    model = checkpoint("llama-relu")
    spec, weights, _ = load_model(model)
    config = TrainConfig(powerinfer=written(tmp_path / "pi", networks(spec)))
    options = Export(budget=BUDGET, rest="drop", validate=False)
    given = {"train_config": config, "calibration": Calibration(tokens=256, seqlen=32)}
    manifest = export_model(Source(str(model)), tmp_path / "out", options, **given)
    assert (manifest.predictor["kind"], manifest.predictor["networks"]) == ("layerwise", "PowerInfer")
    predictor = make_predictor(spec, weights.fingerprint())
    with pytest.raises(UserError, match="leave one of them out"):
        export_model(Source(str(model)), tmp_path / "other", options, predictor=predictor, **given)
    with pytest.raises(UserError, match="not static"):
        export_model(Source(str(model)), tmp_path / "other", replace(options, selector="static"), **given)


@pytest.mark.parametrize(
    ("selector", "calibration", "words"),
    [
        ("relu", None, "the given predictor is of the kind static, not relu"),
        (None, Calibration(seqlen=32, criterion="plainact"), "nothing is traced, and seqlen and criterion cannot be"),
    ],
)
def test_options_that_a_given_predictor_makes_useless(checkpoint, tmp_path, selector, calibration, words):
    model = checkpoint("llama-relu")
    spec, weights, _ = load_model(model)
    predictor = make_predictor(spec, weights.fingerprint(), "static")
    options = Export(selector=selector, budget=BUDGET, validate=False)
    with pytest.raises(UserError, match=words):
        export_model(
            Source(str(model)), tmp_path / "out", options, predictor=predictor, calibration=calibration or Calibration()
        )


def test_a_random_selector_reads_no_text(checkpoint, tmp_path):
    options = Export(selector="random", budget=BUDGET, rest="drop", validate=False)
    model = Source(str(checkpoint("llama-relu")))
    with pytest.raises(UserError, match="random selector is made, so nothing is traced, and texts and tokens cannot"):
        export_model(model, tmp_path / "out", options, calibration=Calibration(texts=("a.txt",), tokens=64, seed=1))
    export_model(model, tmp_path / "out", options, calibration=Calibration(dense_layers=2, seed=1))


def test_an_unknown_criterion_is_refused_at_once():
    with pytest.raises(UserError, match="no importance criterion 'l2nrom'; known: epenas"):
        Calibration(criterion="l2nrom")


def test_networks_that_are_not_there_are_told_before_the_calibration(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_calibrate", lambda *_, **__: pytest.fail("traced"))
    config = TrainConfig(powerinfer=tmp_path / "typo")
    with pytest.raises(UserError, match="no such predictor"):
        export_model(Source(str(checkpoint("llama-relu"))), tmp_path / "out", Export(), train_config=config)


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        ({"budget": Budget(neurons=(0.5, 0.5, 0.5, 0.5, 0.5))}, {}, "5 .*sparse layers"),
        ({"selector": "static"}, {"train_config": TrainConfig(budget=Budget(heads=(0.5,) * 5))}, "5 .*sparse layers"),
        ({"selector": "shadow"}, {}, "give --rank"),
        ({}, {"calibration": Calibration(dense_layers=9)}, "9 dense layers"),
    ],
    ids=["budget", "training budget", "rank", "dense layers"],
)
def test_sizes_that_do_not_fit_are_told_before_the_calibration(
    checkpoint, tmp_path, monkeypatch, options, changes, words
):
    monkeypatch.setattr(pipeline, "_calibrate", lambda *_, **__: pytest.fail("traced"))
    with pytest.raises(UserError, match=words):
        export_model(Source(str(checkpoint("llama-relu"))), tmp_path / "out", Export(**options), **changes)


def test_the_name_of_a_model(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert [Source(given).name for given in (".", "../model", "owner/name:Q4_K_M")] == ["model", "model", "name:Q4_K_M"]
