"""The comparison with transformers: it passes for a correctly read checkpoint, and fails for a wrongly read one."""

from __future__ import annotations

from dataclasses import replace

import psutil
import pytest
import torch

from shadowllm.errors import UserError
from shadowllm.evaluation import transformers_check
from shadowllm.evaluation.transformers_check import TOLERANCE, compare_with_transformers
from shadowllm.models.registry import load_model
from tests.conftest import FAMILIES, VARIANTS, build_transformers_model
from tests.models.checkpoints import base_model, copied, edit_json, rewrite, save_adapter, write_gguf
from tests.models.files.test_gguf import MODELS
from tests.models.files.test_gguf import build as build_gguf


def compare(path):
    _, weights, checkpoint = load_model(path)
    return compare_with_transformers(checkpoint, weights)


@pytest.mark.parametrize("variant", VARIANTS | FAMILIES)
def test_families_are_read_as_transformers_reads_them(checkpoint, variant):
    found = compare(checkpoint(variant))
    assert found["tokens"] == 24
    assert found["max_rel"] <= found["tolerance"] == TOLERANCE


@pytest.mark.parametrize(
    ("variant", "wrong"),
    [
        ("llama-gqa", {"norm_eps": 1e-2}),
        ("llama-gqa", {"activation": "gelu"}),
        ("llama-rope-linear", {"rope": None}),
        ("opt", {"position_offset": 0}),
    ],
)
def test_a_fact_read_wrongly_fails(checkpoint, variant, wrong):
    spec, weights, opened = load_model(checkpoint(variant))
    if "rope" in wrong:
        wrong = {"rope": replace(spec.rope, frequencies=[2 * f for f in spec.rope.frequencies])}
    changed = {"embed_positions.weight": weights["embed_positions.weight"][2:]} if "position_offset" in wrong else {}
    weights.spec = replace(spec, **wrong)
    if changed:
        weights.spec = replace(weights.spec, max_seqlen=spec.max_seqlen + 2)
    with pytest.raises(UserError, match="not read as transformers reads it"):
        compare_with_transformers(opened, weights)


def test_a_checkpoint_without_finite_logits_is_named(checkpoint):
    _, weights, opened = load_model(checkpoint("llama-gqa"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers_check, "_logits", lambda *_: torch.full((1, 4, 97), torch.nan))
        with pytest.raises(UserError, match="logits of the checkpoint are NaN or infinite; it is damaged"):
            compare_with_transformers(opened, weights)


def test_scales_that_are_ignored_fail(checkpoint, tmp_path):
    """An error that the comparison with our own decoder cannot find."""
    folder = copied(checkpoint("llama-gqa"), tmp_path / "model")
    _, weights, opened = load_model(folder)
    double = copied(checkpoint("llama-gqa"), tmp_path / "other")
    rewrite(double, lambda tensors: {n: t * 2 if "up_proj" in n else t for n, t in tensors.items()})
    with pytest.raises(UserError, match="not read as transformers reads it"):
        compare_with_transformers(replace(opened, folder=double), weights)


def test_a_prefix_is_taken_off_on_both_sides(checkpoint, tmp_path):
    folder = copied(checkpoint("llama-gqa"), tmp_path / "model")
    rewrite(folder, lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()})
    with pytest.warns(UserWarning, match="_orig_mod"):
        assert compare(folder)["max_rel"] <= TOLERANCE


@pytest.mark.parametrize("scaled", [True, False])
def test_gguf(tmp_path, scaled):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    model = build_transformers_model("llama", {"rope_parameters": rope} if scaled else {})
    write_gguf(tmp_path / "a.gguf", model, keys={"rope.scaling.factor": 2.0} if scaled else {})
    assert compare(tmp_path / "a.gguf")["max_rel"] <= TOLERANCE


@pytest.mark.filterwarnings("ignore:texts are limited to 48 tokens")
@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("qwen")])
def test_other_gguf_files(tmp_path, name):
    build_gguf(name, tmp_path / "a.gguf")
    found = compare(tmp_path / "a.gguf")
    assert found.get("max_rel", 0) <= TOLERANCE
    assert "max_rel" in found or MODELS[name][0] in ("gemma", "granite", "smollm3")  # transformers may not read these


def quantise(tensors, suffix, dtype=torch.float32):
    found = dict(tensors)
    for name in [name for name in tensors if "_proj.weight" in name]:
        scale = (tensors[name].abs().amax(dim=1, keepdim=True) / 440).to(dtype)
        found[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        found[f"{name}{suffix}"] = scale
    return found


def quantised(source, folder, method, dtype=torch.float32):
    if method == "compressed-tensors":
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: not compared")
    copied(source, folder)
    suffix = "_scale" if method == "compressed-tensors" else "_scale_inv"
    rewrite(folder, lambda tensors: quantise(tensors, suffix, dtype))
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights}
    settings = {
        "quant_method": method,
        "format": "float-quantized",
        "config_groups": {"a": group},
        "ignore": ["lm_head"],
    }
    if method == "fp8":
        settings = {"quant_method": method, "modules_to_not_convert": ["lm_head"], "weight_block_size": [1, 32]}
    edit_json(folder / "config.json", quantization_config=settings)
    return folder


@pytest.mark.parametrize("method", ["compressed-tensors", "fp8"])
def test_quantised_checkpoints(checkpoint, tmp_path, method):
    found = compare(quantised(checkpoint("llama-blocks"), tmp_path / "model", method))
    assert "skipped" not in found, found
    assert found["max_rel"] <= found["tolerance"] == TOLERANCE


@pytest.mark.parametrize(
    ("method", "tolerance"), [("compressed-tensors", transformers_check.QUANTISED_TOLERANCE), ("fp8", TOLERANCE)]
)
def test_scales_of_16_bits(checkpoint, tmp_path, method, tolerance):
    """transformers itself rounds the products of compressed-tensors to 16 bits when it dequantises."""
    found = compare(quantised(checkpoint("llama-blocks"), tmp_path / "model", method, torch.bfloat16))
    assert found["max_rel"] <= found["tolerance"] == tolerance


def test_settings_under_their_older_name(checkpoint, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: not compared")
    folder = copied(checkpoint("llama-blocks"), tmp_path / "model")
    rewrite(folder, lambda tensors: quantise(tensors, "_scale"))
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    groups = {"a": {"targets": ["Linear"], "weights": weights}}
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
    edit_json(folder / "config.json", compression_config=settings | {"ignore": ["lm_head"]})
    assert compare(folder)["max_rel"] <= TOLERANCE


def test_too_little_memory_is_said(checkpoint, monkeypatch):
    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(transformers_check.psutil, "virtual_memory", lambda: memory)
    assert "GB of memory" in compare(checkpoint("opt"))["skipped"]


def test_a_split_gguf_model_is_said_not_to_be_compared(tmp_path):
    write_gguf(tmp_path / "a.gguf", build_transformers_model("llama", {}), split=12)
    assert "several files" in compare(tmp_path)["skipped"]


@pytest.mark.parametrize(
    "config",
    [
        {"pad_token_id": 5000},
        {"return_dict": False},
        {"attn_implementation": "flash_attention_2"},
    ],
)
def test_what_only_transformers_stumbles_over_is_compared_all_the_same(checkpoint, tmp_path, config):
    assert compare(copied(checkpoint("llama-gqa"), tmp_path / "model", **config))["max_rel"] <= TOLERANCE


def test_wrappers_inside_the_model_are_taken_out_on_both_sides(checkpoint, tmp_path):
    folder = copied(checkpoint("llama-gqa"), tmp_path / "model")
    wrapped = {"layers.": "layers._fsdp_wrapped_module.", "q_proj": "_orig_mod.q_proj"}

    def change(tensors):
        for part, longer in wrapped.items():
            tensors = {name.replace(part, longer): tensor for name, tensor in tensors.items()}
        return tensors

    rewrite(folder, change)
    with pytest.warns(UserWarning, match="come from a wrapper"):
        assert compare(folder)["max_rel"] <= TOLERANCE


def test_scales_as_autofp8_names_them(checkpoint, tmp_path):
    folder = copied(checkpoint("llama-blocks"), tmp_path / "model")
    rewrite(folder, lambda tensors: quantise(tensors, "_scale"))
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8", "ignored_layers": ["lm_head"]})
    assert compare(folder)["max_rel"] <= TOLERANCE


def test_blocks_that_do_not_divide_are_said_not_to_be_compared(checkpoint, tmp_path):
    folder = copied(checkpoint("llama-blocks"), tmp_path / "model")
    settings = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"], "weight_block_size": [40, 40]}
    rewrite(folder, lambda tensors: quantise(tensors, "_scale_inv"))
    edit_json(folder / "config.json", quantization_config=settings)
    assert "do not divide" in compare(folder)["skipped"]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of peft
@pytest.mark.parametrize("kind", ["tied", "gguf", "compressed-tensors", "fp8"])
def test_an_adapter_is_inserted_on_both_sides(checkpoint, tmp_path, kind):
    """In a tied model, it unties the tables. To others it is added after they are converted to floats."""
    pytest.importorskip("peft", reason="merging adapters needs peft (pip install '.[peft]')")
    plain = checkpoint("llama-mqa-tied" if kind == "tied" else "llama-blocks")
    tables = ["embed_tokens", "lm_head"] if kind == "tied" else []
    adapter = save_adapter(tmp_path / "adapter", plain, target_modules=["q_proj", "down_proj", *tables])
    model = plain
    if kind == "gguf":
        model = tmp_path / "a.gguf"
        write_gguf(model, base_model(plain))
    elif kind != "tied":
        model = quantised(plain, tmp_path / "model", kind)
    _, weights, opened = load_model(model, adapter=adapter)
    found = compare_with_transformers(opened, weights)
    assert "skipped" not in found, found
    assert found["max_rel"] <= found["tolerance"]
    base = load_model(model)[1]
    assert (weights["layers.1.q_proj.weight"] - base["layers.1.q_proj.weight"].float()).abs().max() > 0.05
