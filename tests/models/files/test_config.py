"""Configs: they are read as in transformers, and unusable values are refused in one line."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from shadowllm.errors import UserError
from shadowllm.models.registry import load_model
from tests.models.checkpoints import copied, edit_json, same_as_transformers

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "config",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": None},
        {"num_key_value_heads": -1},
        {"hidden_size": "48"},
        {"hidden_size": 48.0},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": True},
        {"num_hidden_layers": 10**9},
        {"vocab_size": None},
        {"max_position_embeddings": None},
        {"max_position_embeddings": 10**12},
        {"transformers_weights": 5},
        {"quantization_config": "gptq"},
        {"quantization_config": {}},
        {"head_dim": 0},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": "1e-5"},
        {"rms_norm_eps": -1.0},
        {"rms_norm_eps": None},
        {"hidden_act": None},
        {"tie_word_embeddings": None},
        {"attention_bias": "yes"},
        {"bos_token_id": [1]},
        {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "10000"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}},
        {"rope_parameters": {"rope_type": "linear", "factor": None, "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}},
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 0}},
        {"rope_parameters": "linear"},
    ],
)
def test_nonsense_is_refused(checkpoint, tmp_path, config):
    folder = copied(checkpoint("llama-gqa"), tmp_path / "model", **config)
    with pytest.raises(UserError) as refusal:
        load_model(folder)
    assert "\n" not in str(refusal.value)
    assert refusal.value.remedy


def test_configs_of_single_layers_are_refused_by_name(checkpoint, tmp_path):
    folder = copied(checkpoint("llama-gqa"), tmp_path / "model", per_layer_config={"1": {"intermediate_size": 44}})
    with pytest.raises(UserError, match="per_layer_config"):
        load_model(folder)
    edit_json(folder / "config.json", per_layer_config={})
    load_model(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": ', "\ud800"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_damaged_json_is_named(checkpoint, tmp_path, name, text):
    folder = copied(checkpoint("llama-gqa"), tmp_path / "model")
    (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=name):
        load_model(folder)


def test_missing_config_or_family(checkpoint, tmp_path):
    folder = copied(checkpoint("llama-gqa"), tmp_path / "model")
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="which family"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(folder)


STOP = 90


@pytest.mark.parametrize(
    ("generation", "config", "stops"),
    [
        ({"eos_token_id": [2, STOP]}, 2, (2, STOP)),
        ({"eos_token_id": 2}, STOP, (2,)),
        ({"bos_token_id": 1}, STOP, ()),  # the file exists but names no stop tokens
        (None, STOP, (STOP,)),
        (None, [2, STOP], (2, STOP)),
        (None, None, ()),
    ],
)
def test_stop_tokens_are_those_of_transformers(checkpoint, tmp_path, generation, config, stops):
    folder = copied(checkpoint("llama-gqa"), tmp_path / "model", eos_token_id=config)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        edit_json(folder / "generation_config.json", **generation)
    assert load_model(folder)[0].eos_token_ids == stops
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).generation_config.eos_token_id
    assert stops == (() if theirs is None else tuple(theirs) if isinstance(theirs, list) else (theirs,))


def test_settings_of_generation_in_the_config_are_kept(checkpoint, tmp_path):
    """transformers reads them from the file; its classes of configs do not keep them."""
    settings = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "suppress_tokens": [5], "num_beams": 4}
    folder = copied(checkpoint("llama-gqa"), tmp_path / "model", **settings)
    (folder / "generation_config.json").unlink(missing_ok=True)
    ours, theirs = (
        load_model(folder)[2].generation_config,
        AutoModelForCausalLM.from_pretrained(folder).generation_config,
    )
    for name, value in settings.items():
        assert getattr(ours, name) == getattr(theirs, name) == value


def test_the_bundle_keeps_the_models_own_generation_config(checkpoint, tmp_path):
    from tests.bundles import make_bundle

    folder, out = copied(checkpoint("llama-gqa"), tmp_path / "model"), tmp_path / "out"
    own = {"eos_token_id": [2, STOP], "do_sample": False, "temperature": 0.6, "stop_strings": ["###"]}
    (folder / "generation_config.json").write_text(json.dumps(own))
    out.mkdir()
    manifest = make_bundle(folder, out)
    assert json.loads((out / "generation_config.json").read_text()) == own
    assert manifest.spec.eos_token_ids == (2, STOP)
    assert "generation_config.json" in manifest.files


def test_a_bos_token_outside_the_vocabulary_is_not_used(checkpoint, tmp_path):
    folder = copied(checkpoint("llama-gqa"), tmp_path / "model", bos_token_id=10**6)
    with pytest.warns(UserWarning, match="outside its vocabulary"):
        assert load_model(folder)[0].bos_token_id is None


@pytest.mark.parametrize("inner", [{}, {"original_max_position_embeddings": 32}])
def test_llama3_scaling_takes_the_length_at_the_top_of_the_config(checkpoint, tmp_path, inner):
    folder = copied(
        checkpoint("llama-gqa"),
        tmp_path / "model",
        rope_parameters=LLAMA3 | inner,
        original_max_position_embeddings=16,
    )
    same_as_transformers(folder)


def test_swish_is_silu(checkpoint, tmp_path):
    same_as_transformers(copied(checkpoint("llama-gqa"), tmp_path / "model", hidden_act="swish"))


@pytest.mark.parametrize("variant", ["llama-gqa", "opt"])
def test_a_model_that_is_not_causal_is_refused(checkpoint, tmp_path, variant):
    folder = copied(checkpoint(variant), tmp_path / "model", is_causal=False)
    with pytest.raises(UserError, match="not causal"):
        load_model(folder)
