"""LoRA adapters that are merged into a model: the meaning is that of peft, or an error names what cannot be merged."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from shadowllm.errors import UserError
from shadowllm.models.decoder import Decoder
from shadowllm.models.registry import load_model
from tests.models.checkpoints import base_model, copied, edit_json, logits, rewrite, save_adapter, write_gguf

peft = pytest.importorskip("peft", reason="merging adapters needs peft (pip install '.[peft]')")

# Warnings of peft, and ours about tied tables; those that matter are tested.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

Q = "base_model.model.model.layers.1.self_attn.q_proj"
MIXED = {
    "target_modules": ["q_proj", "down_proj", "fc2"],
    "rank_pattern": {"down_proj": 3},
    "alpha_pattern": {"fc2": 5},
}
TABLES = {"target_modules": ["embed_tokens", "lm_head"]}


def theirs(model, adapter):
    return logits(peft.PeftModel.from_pretrained(base_model(model), adapter).eval())


def ours(model, adapter):
    spec, weights, _ = load_model(model, adapter=adapter)
    return logits(Decoder(spec, weights.load()))


@pytest.fixture
def adapter(checkpoint, tmp_path):
    return save_adapter(tmp_path / "adapter", checkpoint("llama-gqa"))


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("llama-gqa", {"target_modules": "all-linear"}),
        ("llama-gqa", MIXED | {"use_rslora": True, "layers_to_transform": [1]}),
        ("llama-biases", MIXED | {"use_dora": True}),
        ("llama-biases", {"bias": "all"}),
        ("llama-biases", {"lora_bias": True}),
        ("llama-gqa", {"modules_to_save": ["lm_head", "input_layernorm"]}),
        ("opt", {"target_modules": "all-linear", "bias": "lora_only"}),
        ("opt", MIXED | {"use_dora": True}),
        ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
        # Tied tables: peft's own merge would change both. Its unmerged model, compared with here, does not.
        ("llama-mqa-tied", TABLES),
        ("llama-mqa-tied", TABLES | {"ensure_weight_tying": True}),
        ("llama-mqa-tied", {"modules_to_save": ["embed_tokens"]}),
        ("llama-mqa-tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("llama-mqa-tied", {"trainable_token_indices": [3, 5]}),
        ("opt", {"target_modules": ["lm_head"]}),
    ],
)
def test_the_logits_are_those_of_peft(checkpoint, tmp_path, variant, options):
    model = checkpoint(variant)
    adapter = save_adapter(tmp_path / "adapter", model, **options)
    found = ours(model, adapter)
    torch.testing.assert_close(found, theirs(model, adapter), atol=2e-4, rtol=1e-5)
    assert (found - logits(base_model(model))).abs().max() > 0.1
    if variant != "llama-mqa-tied" and options != {"target_modules": ["lm_head"]}:
        merged = peft.PeftModel.from_pretrained(base_model(model), adapter).merge_and_unload()
        torch.testing.assert_close(found, logits(merged), atol=2e-4, rtol=1e-5)


def test_tables_that_stay_equal_stay_tied(checkpoint, tmp_path):
    model = checkpoint("llama-mqa-tied")
    for options, tied in (({"trainable_token_indices": [3]}, True), ({}, True), (TABLES, False)):
        adapter = save_adapter(tmp_path / str(options), model, **options)
        spec, weights, _ = load_model(model, adapter=adapter)
        assert spec.tied_embeddings is tied
        assert ("lm_head.weight" in weights) is not tied


def test_types_and_provenance(checkpoint, adapter):
    spec, plain, _ = load_model(checkpoint("llama-gqa"))
    _, merged, opened = load_model(checkpoint("llama-gqa"), adapter=adapter)
    changed = {name for name in plain if not torch.equal(plain[name], merged[name])}
    assert changed == {f"layers.{i}.q_proj.weight" for i in range(spec.n_layers)}
    prints = {plain.fingerprint(), merged.fingerprint(), opened.adapter.fingerprint()}
    assert len(prints) == 3
    (adapter / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text().replace("8", "9"))
    assert load_model(checkpoint("llama-gqa"), adapter=adapter)[1].fingerprint() not in prints


def test_merging_a_half_precision_checkpoint_rounds_nothing(checkpoint, adapter, tmp_path):
    model = copied(checkpoint("llama-gqa"), tmp_path / "model")
    rewrite(model, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    torch.testing.assert_close(ours(model, adapter), theirs(model, adapter), atol=2e-4, rtol=1e-5)


def test_gguf(checkpoint, adapter, tmp_path):
    write_gguf(tmp_path / "llama-gqa.gguf", base_model(checkpoint("llama-gqa")))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="someone/Another-7b")
    with pytest.warns(UserWarning, match=r"trained on .*, and is merged into .*llama-gqa\.gguf"):
        found = ours(tmp_path / "llama-gqa.gguf", adapter)
    torch.testing.assert_close(found, theirs(checkpoint("llama-gqa"), adapter), atol=2e-4, rtol=1e-5)


def test_a_padding_token_outside_the_vocabulary(checkpoint, adapter, tmp_path):
    model = copied(checkpoint("llama-gqa"), tmp_path / "model", pad_token_id=1_000_000)
    torch.testing.assert_close(ours(model, adapter), ours(checkpoint("llama-gqa"), adapter))


def test_activations_that_transformers_does_not_have(checkpoint, tmp_path):
    model = copied(checkpoint("llama-relu"), tmp_path / "model", hidden_act="fatrelu", hidden_act_param=0.0)
    adapter = save_adapter(tmp_path / "adapter", checkpoint("llama-relu"))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    expected = theirs(checkpoint("llama-relu"), adapter)
    torch.testing.assert_close(ours(model, adapter), expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"peft_type": "IA3"}, "of the kind IA3, not LORA"),
        ({"alora_invocation_tokens": [1, 2]}, "has the option alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "has the option init_lora_weights"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "has the option layer_replication"),
        ({"megatron_config": {"a": 1}}, "has the option megatron_config"),
        ({"from_the_future": True}, "does not know the option from_the_future"),
        ({"r": 0}, r"does not fit the model \(.*positive"),
        ({"target_modules": ["w1"]}, r"does not fit the model \(.*w1"),
        ({"target_modules": ["q_proj", "k_proj"]}, r"k_proj.lora_A.weight is missing"),
        ({"target_modules": ["k_proj"]}, r"k_proj.lora_A.weight is missing"),
        ({"r": 8}, r"q_proj.lora_A.weight is \(4, 48\), and the model needs \(8, 48\)"),
    ],
)
def test_options_that_are_not_merged(checkpoint, adapter, options, words):
    edit_json(adapter / "adapter_config.json", **options)
    with pytest.raises(UserError, match=words):
        load_model(checkpoint("llama-gqa"), adapter=adapter)


def test_an_adapter_of_another_model(checkpoint, adapter):
    for other, words in (
        (
            "llama-blocks",
            r"is \(4, 48\), and the model needs \(4, 64\)\); it was trained on .*llama-gqa.*: export that",
        ),
        ("opt", "q_proj.lora_A.weight is missing"),
    ):
        with pytest.raises(UserError, match=words), pytest.warns(UserWarning, match="only the shapes"):
            load_model(checkpoint(other), adapter=adapter)
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path) | {f"{Q.replace('1', '7')}.lora_A.weight": torch.ones(4, 48)}, path)
    with pytest.raises(UserError, match=r"the model has no place for .*layers\.7"):
        load_model(checkpoint("llama-gqa"), adapter=adapter)


def test_files_that_are_missing_or_damaged(checkpoint, adapter, tmp_path, monkeypatch):
    model, weights = checkpoint("llama-gqa"), adapter / "adapter_model.safetensors"
    for folder, words in ((tmp_path / "none", "is no folder"), (model, "no adapter_config.json")):
        with pytest.raises(UserError, match=words):
            load_model(model, adapter=folder)
    contents = weights.read_bytes()
    weights.write_bytes(contents[:-8])
    with pytest.raises(UserError, match="damaged or truncated"):
        load_model(model, adapter=adapter)
    save_file(load_file_of(contents, tmp_path) | {f"{Q}.lora_B.weight": torch.full((48, 4), torch.nan)}, weights)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj\.weight holds NaN"):
        load_model(model, adapter=adapter)[1].load()
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="Git LFS"):
        load_model(model, adapter=adapter)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin are pickled"):
        load_model(model, adapter=adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        load_model(model, adapter=adapter)


def load_file_of(contents, tmp_path):
    path = tmp_path / "whole.safetensors"
    path.write_bytes(contents)
    return load_file(path)


def test_without_peft(checkpoint, adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"needs the package peft; pip install 'shadowllm\[peft\]'"):
        load_model(checkpoint("llama-gqa"), adapter=adapter)
