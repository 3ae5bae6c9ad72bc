"""GGUF files: every key and tensor is read, or an error names it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from shadowllm.errors import UserError
from shadowllm.models.decoder import Decoder
from shadowllm.models.registry import load_model
from tests.conftest import build_transformers_model
from tests.models.checkpoints import logits, write_gguf

GROUPED = {"num_key_value_heads": 2}


@pytest.fixture(scope="module")
def model():
    return build_transformers_model("llama", GROUPED)


def check_same(path, model):
    spec, weights, _ = load_model(path)
    found = logits(Decoder(spec, weights.load()))
    torch.testing.assert_close(found, logits(model), atol=2e-5, rtol=0)
    return spec


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_plain(tmp_path, options):
    model = build_transformers_model("llama", GROUPED | options)
    write_gguf(tmp_path / "a.gguf", model)
    assert check_same(tmp_path / "a.gguf", model).tied_embeddings is model.config.tie_word_embeddings


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_other_families(tmp_path, family, tied):
    model = build_transformers_model(family, GROUPED | {"head_dim": 12, "tie_word_embeddings": tied})
    write_gguf(tmp_path / "a.gguf", model, arch=family)
    spec = check_same(tmp_path / "a.gguf", model)
    assert (spec.family, spec.tied_embeddings) == (family, tied)


def test_biases_that_a_family_does_not_have_are_refused(tmp_path):
    model = build_transformers_model("llama", GROUPED | {"attention_bias": True})
    write_gguf(tmp_path / "a.gguf", model, arch="qwen2")
    with pytest.raises(UserError, match="biases for attn_q, attn_k, attn_v, attn_output alone"):
        load_model(tmp_path / "a.gguf")


def rope(kind="linear", factor=2.0, **more):
    return {"rope_parameters": {"rope_type": kind, "factor": factor, "rope_theta": 500.0} | more}


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        (rope(), {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}),
        (rope(), {"rope.scaling.factor": 2.0}),
        (rope(), {"rope.scale_linear": 2.0}),
        (rope("default"), {"rope.scaling.type": "none", "rope.scaling.factor": 2.0}),
        (rope("default"), {"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}),
        (rope("default"), {"rope.scaling.finetuned": True, "expert_count": 0, "vocab_size": 97}),
        ({"head_dim": 20}, {"attention.key_length": 20, "attention.value_length": 20}),
    ],
)
def test_metadata_is_honoured(tmp_path, options, keys):
    model = build_transformers_model("llama", GROUPED | options)
    write_gguf(tmp_path / "a.gguf", model, keys=keys)
    check_same(tmp_path / "a.gguf", model)


@pytest.mark.parametrize("without", [(), ("rope.dimension_count",), ("rope.freq_base", "attention.head_count_kv")])
def test_keys_that_may_be_absent(tmp_path, without):
    options = {} if "attention.head_count_kv" in without else GROUPED
    model = build_transformers_model("llama", options | {"head_dim": 20})
    write_gguf(tmp_path / "a.gguf", model, keys={"attention.key_length": 20}, without=without)
    check_same(tmp_path / "a.gguf", model)


def factors(head_dim, factor=8.0, context=16):
    """The table that llama.cpp's converter writes for Llama 3.1."""
    turns = context * 500.0 ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
    keep = np.clip((turns - 1) / 3, 0, 1)  # 1 leaves a frequency unchanged
    return (1 / (keep + (1 - keep) / factor)).astype(np.float32), None


def test_a_table_of_rope_factors_is_llama_3s_scaling(tmp_path):
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    model = build_transformers_model("llama", GROUPED | rope("llama3", 8.0, **more))
    keys = {"rope.scaling.original_context_length": 16}
    write_gguf(tmp_path / "a.gguf", model, keys=keys, extra={"rope_freqs.weight": factors(12)})
    check_same(tmp_path / "a.gguf", model)


def test_other_rope_factors_are_refused(tmp_path, model):
    for name, table in (("other", np.linspace(1, 9, 6, dtype=np.float32)), ("short", np.ones(3, np.float32) * 2)):
        write_gguf(tmp_path / f"{name}.gguf", model, extra={"rope_freqs.weight": (table, None)})
        with pytest.raises(UserError, match=r"not those of Llama 3\.1"):
            load_model(tmp_path / f"{name}.gguf")
    write_gguf(tmp_path / "ones.gguf", model, extra={"rope_freqs.weight": (np.ones(6, np.float32), None)})
    check_same(tmp_path / "ones.gguf", model)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, "'yarn'"),
        ({"rope.scaling.type": "longrope"}, "'longrope'"),
        ({"rope.scaling.attn_factor": 1.5}, "attn_factor"),
        ({"rope.dimension_count": 6}, "rotated in part"),
        ({"attention.value_length": 24}, "value_length"),
        ({"expert_count": 8}, "expert_count"),
        ({"attention.sliding_window": 16}, "sliding_window"),
        ({"attention.causal": False}, "causal"),
        ({"attention.head_count": 0}, "head_count as 0"),
        ({"feed_forward_length": [88, 88, 88]}, "feed_forward_length"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "epsilon"),
        ({"block_count": "three"}, "block_count"),
        ({".tokenizer.ggml.bos_token_id": "one"}, "bos_token_id as 'one'"),
        ({".tokenizer.ggml.eot_token_id": "one"}, "eot_token_id as 'one'"),
        ({".general.type": "adapter"}, "of the type 'adapter'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, model, keys, words):
    write_gguf(tmp_path / "a.gguf", model, keys=keys)
    with pytest.raises(UserError, match=words):
        load_model(tmp_path / "a.gguf")


def test_unknown_keys_are_named(tmp_path, model):
    write_gguf(tmp_path / "a.gguf", model, keys={"attention.of_the_future": 3})
    with pytest.warns(UserWarning, match=r"not read: llama\.attention\.of_the_future"):
        load_model(tmp_path / "a.gguf")


def test_stop_tokens(tmp_path, model):
    ids = {".tokenizer.ggml.bos_token_id": 1, ".tokenizer.ggml.eos_token_id": 2, ".tokenizer.ggml.eot_token_id": 90}
    write_gguf(tmp_path / "a.gguf", model, keys=ids | {".tokenizer.ggml.eom_token_id": 91})
    spec, _, checkpoint = load_model(tmp_path / "a.gguf")
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2, 90, 91))
    assert checkpoint.generation_config.eos_token_id == [2, 90, 91]


class TestSplit:
    @pytest.fixture
    def parts(self, tmp_path, model):
        write_gguf(tmp_path / "a.gguf", model, split=12)
        return sorted(tmp_path.glob("*.gguf"))

    def test_any_part_or_the_folder_is_the_model(self, parts, model):
        assert len(parts) == 3
        for path in (*parts, parts[0].parent):
            check_same(path, model)

    def test_a_missing_part_is_named(self, parts):
        parts[1].unlink()
        with pytest.raises(UserError, match="00002-of-00003"):
            load_model(parts[0])

    def test_a_renamed_part_is_no_whole_model(self, parts):
        parts[0].rename(parts[0].with_name("model.gguf"))
        with pytest.raises(UserError, match="one of 3 parts"):
            load_model(parts[0].with_name("model.gguf"))

    def test_several_models_are_asked_about(self, parts, model):
        write_gguf(parts[0].with_name("b.gguf"), model)
        with pytest.raises(UserError, match=r"2 GGUF models; name one"):
            load_model(parts[0].parent)


@pytest.mark.parametrize("arch", ["gemma", "bamboo", "mistral"])
def test_other_architectures_are_refused_by_name(tmp_path, model, arch):
    write_gguf(tmp_path / "a.gguf", model, arch=arch)
    with pytest.raises(UserError, match=f"family '{arch}'"):
        load_model(tmp_path / "a.gguf")


def test_the_name_of_a_model_does_not_change_its_family(tmp_path, model):
    write_gguf(tmp_path / "a.gguf", model, keys={".general.name": "mistral"})
    check_same(tmp_path / "a.gguf", model)


@pytest.mark.parametrize("name", ["blk.0.attn_q_norm.weight", "blk.0.ffn_gate_exps.weight", "rope_factors_long.weight"])
def test_tensors_that_are_not_read_are_refused(tmp_path, model, name):
    write_gguf(tmp_path / "a.gguf", model, extra={name: (np.ones(12, np.float32), None)})
    with pytest.raises(UserError, match=name):
        load_model(tmp_path / "a.gguf")


def test_biases_of_some_projections_are_refused(tmp_path, model):
    write_gguf(tmp_path / "a.gguf", model, extra={"blk.0.attn_q.bias": (np.ones(48, np.float32), None)})
    with pytest.raises(UserError, match=r"biases .* attn_q alone"):
        load_model(tmp_path / "a.gguf")


def test_a_type_that_gguf_cannot_dequantise_is_named(tmp_path):
    model = build_transformers_model("llama", GROUPED | {"tie_word_embeddings": True})
    head = np.zeros((97, 48), np.int8), gguf.GGMLQuantizationType.I8
    write_gguf(tmp_path / "a.gguf", model, extra={"output.weight": head})
    with pytest.raises(UserError, match=r"output\.weight .* of type I8"):
        load_model(tmp_path / "a.gguf")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_quantised_types(tmp_path, kind):
    model = build_transformers_model("llama", GROUPED | {"hidden_size": 64, "intermediate_size": 96})
    write_gguf(tmp_path / "a.gguf", model, kind=gguf.GGMLQuantizationType[kind])
    weights = load_model(tmp_path / "a.gguf")[1]
    bits = {"F16": 10, "BF16": 8, "Q8_0": 7, "Q4_0": 3, "Q5_1": 4}[kind]
    up, original = weights["layers.1.up_proj.weight"], model.state_dict()["model.layers.1.mlp.up_proj.weight"]
    assert 0 < (up - original).abs().max() < original.abs().max() * 2.0**-bits


@pytest.mark.parametrize("damage", [lambda data: data[:2000], lambda data: b"GGML" + data[4:], lambda data: b""])
def test_a_damaged_file_is_named(tmp_path, model, damage):
    path = tmp_path / "a.gguf"
    write_gguf(path, model)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"a\.gguf is damaged"):
        load_model(path)


def test_a_key_that_is_missing_is_named(tmp_path, model):
    write_gguf(tmp_path / "a.gguf", model, without=("block_count",))
    with pytest.raises(UserError, match=r"has no llama\.block_count"):
        load_model(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    "name", ["blk.2.attn_k.bias", "blk.1.ffn_up.bias", "blk.0.ffn_down.bias", "blk.1.attn_norm.bias"]
)
def test_a_bias_that_the_model_does_not_have_is_refused(tmp_path, model, name):
    write_gguf(tmp_path / "a.gguf", model, extra={name: (np.ones(48, np.float32), None)})
    with pytest.raises(UserError, match="bias"):
        load_model(tmp_path / "a.gguf")
