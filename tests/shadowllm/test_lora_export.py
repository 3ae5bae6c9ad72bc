"""Exports with a LoRA adapter: the bundle is that of the merged model, and says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shadowllm.bundle.manifest import read_manifest
from shadowllm.cli import main
from shadowllm.errors import UserError
from shadowllm.evaluation.transformers_check import compare_with_transformers
from shadowllm.models.registry import load_model
from shadowllm.runtime.ort.session import OrtSession
from tests.bundles import make_predictor
from tests.models.checkpoints import base_model, copied, save_adapter

peft = pytest.importorskip("peft", reason="merging adapters needs peft (pip install '.[peft]')")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of peft


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["llama-gqa", "opt"])
def test_the_bundle_is_that_of_the_merged_model(checkpoint, tmp_path, capsys, variant):
    model, out, predictor = checkpoint(variant), tmp_path / "out", tmp_path / "predictor.safetensors"
    adapter = save_adapter(tmp_path / "adapter", model, target_modules="all-linear", modules_to_save=["lm_head"])
    spec, weights, opened = load_model(model, adapter=adapter)
    make_predictor(spec, weights.fingerprint()).save(predictor)
    command = ["export", str(model), str(out), "--predictor", str(predictor), "--rest", "drop", "--adapter"]
    assert main([*command, str(adapter)]) == 0
    assert f"SHA-256 {opened.adapter.fingerprint()}" in capsys.readouterr().out
    manifest = read_manifest(out)
    assert manifest.validation["transformers"]["max_rel"] < 1e-4
    assert manifest.adapter_fingerprint == opened.adapter.fingerprint()
    prompt = torch.arange(3, 30)[None]
    merged = peft.PeftModel.from_pretrained(base_model(model), adapter).merge_and_unload()
    with OrtSession(out, "dense") as session, torch.no_grad():
        found = session.prefill(prompt.tolist())[0]
        expected, plain = (each(prompt).logits[0, -1].numpy() for each in (merged, base_model(model)))
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-4)
    assert np.abs(found - plain).max() > 0.1


def test_a_predictor_belongs_to_model_and_adapter(checkpoint, tmp_path):
    model = checkpoint("llama-gqa")
    spec, weights, _ = load_model(model)
    _, merged, _ = load_model(model, adapter=save_adapter(tmp_path / "adapter", model))
    with pytest.raises(UserError, match="predictor of another model"):
        make_predictor(spec, weights.fingerprint()).check_base(spec, merged.fingerprint())


def test_an_adapter_beside_its_model(checkpoint, tmp_path):
    """transformers would load it with the model, so it would be inserted twice in the comparison."""
    folder = copied(checkpoint("llama-gqa"), tmp_path / "model")
    save_adapter(folder, checkpoint("llama-gqa"))
    _, weights, opened = load_model(folder, adapter=folder)
    assert compare_with_transformers(opened, weights)["max_rel"] < 1e-4


def test_another_adapter_does_not_hide_the_one_beside_the_model(checkpoint, tmp_path):
    folder = copied(checkpoint("llama-gqa"), tmp_path / "model")
    save_adapter(folder, checkpoint("llama-gqa"))
    with pytest.raises(UserError, match="holds an adapter beside the model's weights"):
        load_model(folder, adapter=save_adapter(tmp_path / "other", checkpoint("llama-gqa")))
