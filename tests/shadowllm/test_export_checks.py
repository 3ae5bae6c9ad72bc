"""Checkpoints whose bundles would be useless are refused before an export does any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from shadowllm import pipeline
from shadowllm.cli import main
from shadowllm.config import EngineOptions, Export, Source
from shadowllm.errors import UserError
from shadowllm.export_checks import check_checkpoint
from shadowllm.models.registry import load_model
from tests.models.checkpoints import copied, edit_json, write_gguf


def check(model, out):
    spec, _, checkpoint = load_model(model)
    check_checkpoint(spec, checkpoint, out)


def test_a_generation_config_that_no_run_could_use(checkpoint, tmp_path, monkeypatch):
    folder = copied(checkpoint("llama-gqa"), tmp_path / "model")
    edit_json(folder / "generation_config.json", repetition_penalty="1.7")
    monkeypatch.setattr(pipeline, "_make_predictor", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(UserError, match=r"model/generation_config.json has .*repetition_penalty is '1.7'.*; mend"):
        pipeline.export_model(Source(str(folder)), tmp_path / "out", Export(validate=False))
    assert not (tmp_path / "out").exists()


def test_settings_of_generation_in_the_config(checkpoint, tmp_path):
    folder = copied(checkpoint("llama-gqa"), tmp_path / "model", suppress_tokens=[1 << 20])
    (folder / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"model/config.json has .*suppresses the token 1048576"):
        check(folder, tmp_path / "out")


def test_usable_models(checkpoint, tmp_path):
    check(checkpoint("llama-gqa"), tmp_path / "out")
    write_gguf(tmp_path / "a.gguf", AutoModelForCausalLM.from_pretrained(checkpoint("llama-gqa")))
    check(tmp_path / "a.gguf", tmp_path / "out")


def test_a_model_in_the_place_of_the_bundle(checkpoint, tmp_path):
    copied(checkpoint("llama-gqa"), tmp_path / "out" / "model")
    with pytest.raises(UserError, match="which the bundle is to replace"):
        check(tmp_path / "out" / "model", tmp_path / "out")


@pytest.mark.parametrize(
    "given", [["--sm", "89"], ["--capacity", "2048"], ["--programmatic-dependent-launch"]], ids=" ".join
)
def test_options_of_engines_without_an_engine(checkpoint, tmp_path, capsys, given):
    assert main(["export", str(checkpoint("llama-gqa")), str(tmp_path / "out"), *given]) == 1
    assert "options of engines do nothing without --engine" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "dtype", "words"),
    [
        ({"sms": [89, 90]}, "float32", "does not build for sm_90; it knows 75, 80"),
        ({"sms": [75]}, "bfloat16", "GPUs of sm_75 have no bfloat16"),
        ({"timing_cache": Path("cache")}, "float32", "keeps no timing cache"),
        ({"programmatic_dependent_launch": True}, "float32", "sm_80 has no programmatic dependent launch.*--sm 120"),
        ({"programmatic_dependent_launch": True, "sms": [120, 89]}, "float32", "sm_89 has no programmatic"),
    ],
    ids=["90", "75", "cache", "dependent", "dependent-89"],
)
def test_options_that_an_engine_cannot_have(tmp_path, options, dtype, words):
    pytest.importorskip("tensorrt_rtx")
    plan = Export(engines=[EngineOptions("tensorrt_rtx", **options)], dtype=dtype)
    with pytest.raises(UserError, match=words):
        pipeline.export_model(Source("a model that is not read"), tmp_path / "out", plan)
