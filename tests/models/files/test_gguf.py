"""GGUF files: every key and tensor is read, or an error names it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from shadowllm.errors import UserError
from shadowllm.models.decoder import Decoder
from shadowllm.models.files.gguf_architectures import ARCHITECTURES
from shadowllm.models.files.gguf_config import gguf_config
from shadowllm.models.registry import load_model
from tests.conftest import build_transformers_model
from tests.models.checkpoints import write_gguf
from tests.models.test_families import noise_bound

GROUPED = {"num_key_value_heads": 2}
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
PHI3 = {"num_attention_heads": 3, "num_key_value_heads": 1, "pad_token_id": 0}
LONG, SHORT = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 1.1, 1.2, 1.3, 1.5, 2.0]
LONGROPE = {"rope_type": "longrope", "rope_theta": 500.0, "long_factor": LONG, "short_factor": SHORT}
# version 5.0 of transformers reads the part of a head only at the top level
PHI4 = PHI3 | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 48, "sliding_window": 7}
PHI4 |= {"rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 48}}
TABLES = {
    f"rope_factors_{name}.weight": (np.array(factors, np.float32), None)
    for name, factors in (("long", LONG), ("short", SHORT))
}
GEMMA3 = GROUPED | {
    "head_dim": 16,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "num_hidden_layers": 7,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
    },
}
OTHER_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
# Architecture, family, options of the model, other arguments of `write_gguf`.
MODELS = {
    "gemma": ("gemma", "gemma", GROUPED | {"head_dim": 16, "tie_word_embeddings": True}, {}),
    "gemma3": ("gemma3", "gemma3_text", GEMMA3, {}),
    "gemma3-period": (
        "gemma3",
        "gemma3_text",
        GEMMA3 | {"num_hidden_layers": 3, "layer_types": OTHER_LAYERS},
        {"keys": {"attention.sliding_window_pattern": 2}},
    ),
    "granite": ("granite", "granite", GROUPED | GRANITE, {}),
    "granite-biases": ("granite", "granite", GROUPED | GRANITE | {"attention_bias": True, "mlp_bias": True}, {}),
    "phi3": ("phi3", "phi3", PHI3, {}),
    "phi4": ("phi3", "phi3", PHI4 | {"tie_word_embeddings": True}, {"extra": TABLES}),
    "qwen2": ("qwen2", "qwen2", GROUPED | {"head_dim": 12}, {}),
    "qwen2-tied": ("qwen2", "qwen2", GROUPED | {"tie_word_embeddings": True}, {}),
    "qwen3": ("qwen3", "qwen3", GROUPED | {"head_dim": 12}, {}),
    "smollm3": ("smollm3", "smollm3", GROUPED | {"num_hidden_layers": 5, "pad_token_id": 0}, {}),
}


@pytest.fixture(scope="module")
def model():
    return build_transformers_model("llama", GROUPED)


def check_same(path, model):
    spec, weights, _ = load_model(path)
    input_ids = torch.randint(0, spec.vocab_size, (1, 40), generator=torch.Generator().manual_seed(4))
    exact, bound = noise_bound(model, input_ids)
    with torch.no_grad():
        assert (Decoder(spec, weights.load())(input_ids) - exact).abs().max() <= bound
    return spec


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_plain(tmp_path, options):
    model = build_transformers_model("llama", GROUPED | options)
    write_gguf(tmp_path / "a.gguf", model)
    assert check_same(tmp_path / "a.gguf", model).tied_embeddings is model.config.tie_word_embeddings


def build(name, path):
    """Write a row of `MODELS` as a GGUF file, and return the model."""
    arch, family, options, more = MODELS[name]
    model = build_transformers_model(family, options)
    write_gguf(path, model, arch=arch, **more)
    return model


@pytest.mark.filterwarnings("ignore:texts are limited to 48 tokens")
@pytest.mark.parametrize("name", MODELS)
def test_other_architectures(tmp_path, name):
    model = build(name, tmp_path / "a.gguf")
    spec = check_same(tmp_path / "a.gguf", model)
    assert (spec.family, spec.tied_embeddings) == (model.config.model_type, model.config.tie_word_embeddings)
    assert load_model(tmp_path / "a.gguf")[2].config.architectures == [type(model).__name__]


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
        ({"block_count": 10**9}, "block_count as 1000000000"),
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


def test_stop_tokens_that_no_key_names(tmp_path, model):
    tokens = [f"<{token}>" for token in range(model.config.vocab_size)]
    tokens[40], tokens[41], tokens[42] = "<|end|>", "<|im_end|", "<|endoftext|>"
    keys = {".tokenizer.ggml.tokens": tokens, ".tokenizer.ggml.eos_token_id": 42}
    write_gguf(tmp_path / "a.gguf", model, keys=keys)
    assert load_model(tmp_path / "a.gguf")[0].eos_token_ids == (42, 40)


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


class TestGranite:
    @pytest.mark.parametrize("left_out", [True, False])
    def test_a_factor_that_is_missing_or_zero_changes_nothing(self, tmp_path, left_out):
        neutral = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 12**-0.5}
        model = build_transformers_model("granite", GROUPED | GRANITE | neutral)
        names = ("embedding_scale", "residual_scale", "attention.scale")
        more = {"without": names} if left_out else {"keys": dict.fromkeys(names, 0.0)}
        write_gguf(tmp_path / "a.gguf", model, arch="granite", **more)
        check_same(tmp_path / "a.gguf", model)

    @pytest.mark.parametrize(
        ("keys", "words"),
        [
            ({"logit_scale": 0.0}, r"granite\.logit_scale as 0\.0; it must be above 0"),
            ({"residual_scale": -1.0}, r"granite\.residual_scale as -1\.0; it must be above 0"),
            ({"embedding_scale": float("inf")}, r"granite\.embedding_scale as inf"),
            ({"attention.scale": "large"}, r"granite\.attention\.scale as 'large'"),
            ({"rope.scaling.finetuned": False}, "without RoPE"),
        ],
    )
    def test_other_values_are_refused(self, tmp_path, keys, words):
        write_gguf(tmp_path / "a.gguf", build_transformers_model("granite", GROUPED), arch="granite", keys=keys)
        with pytest.raises(UserError, match=words):
            load_model(tmp_path / "a.gguf")

    def test_logits_must_have_a_factor(self, tmp_path):
        model = build_transformers_model("granite", GROUPED)
        write_gguf(tmp_path / "a.gguf", model, arch="granite", without=("logit_scale",))
        with pytest.raises(UserError, match=r"no granite\.logit_scale"):
            load_model(tmp_path / "a.gguf")


class TestPhi3:
    @pytest.mark.parametrize("window", [0, 7])
    def test_the_window_is_that_of_the_file(self, tmp_path, window):
        model = build_transformers_model("phi3", PHI3 | {"sliding_window": window or None})
        write_gguf(tmp_path / "a.gguf", model, arch="phi3")
        spec = check_same(tmp_path / "a.gguf", model)
        assert (spec.window, spec.window_layers) == ((7, (0, 1, 2)) if window else (None, ()))

    def test_an_old_file_does_not_say_its_window(self, tmp_path):
        model = build_transformers_model("phi3", PHI3)
        write_gguf(tmp_path / "a.gguf", model, arch="phi3", without=("attention.sliding_window",))
        with pytest.warns(UserWarning, match=r"no phi3\.attention\.sliding_window"):
            check_same(tmp_path / "a.gguf", model)

    def test_the_amplitude_is_that_of_the_file(self, tmp_path):
        arch, family, options, more = MODELS["phi4"]
        rope = options["rope_parameters"] | {"attention_factor": 1.5}
        model = build_transformers_model(family, options | {"rope_parameters": rope})
        write_gguf(tmp_path / "a.gguf", model, arch=arch, keys={"rope.scaling.attn_factor": 1.5}, **more)
        with pytest.warns(UserWarning, match="limited to 48 tokens"):
            assert check_same(tmp_path / "a.gguf", model).rope.amplitude == 1.5

    @pytest.mark.parametrize(
        ("keys", "words"),
        [
            ({"rope.scaling.attn_factor": -1.0}, r"attn_factor as -1\.0"),
            ({"rope.scaling.factor": 2.0}, "linear RoPE scaling of Phi-3"),
            ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, "'yarn'"),
            ({"rope.dimension_count": 8}, r"no rope_factors_long\.weight with 4 factors"),
            ({"rope.scaling.original_context_length": 0}, "original_context_length as 0"),
            ({"attention.sliding_window": "wide"}, "sliding_window as 'wide'"),
        ],
    )
    def test_other_values_are_refused(self, tmp_path, keys, words):
        arch, family, options, more = MODELS["phi4"]
        write_gguf(tmp_path / "a.gguf", build_transformers_model(family, options), arch=arch, keys=keys, **more)
        with pytest.raises(UserError, match=words):
            load_model(tmp_path / "a.gguf")

    @pytest.mark.parametrize("left", [*TABLES, None])
    def test_both_tables_are_needed(self, tmp_path, left):
        arch, family, options, _ = MODELS["phi4"]
        tables = {left: TABLES[left]} if left else {}
        write_gguf(tmp_path / "a.gguf", build_transformers_model(family, options), arch=arch, extra=tables)
        with pytest.raises(UserError, match=r"no rope_factors_\w+\.weight with 6 factors"):
            load_model(tmp_path / "a.gguf")


class TestGemma3:
    def test_a_file_without_a_window(self, tmp_path):
        ropes = {
            "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        }
        whole = {"layer_types": ["full_attention"] * 7, "rope_parameters": ropes}
        model = build_transformers_model("gemma3_text", GEMMA3 | whole)
        write_gguf(tmp_path / "a.gguf", model, arch="gemma3", without=("attention.sliding_window",))
        spec = check_same(tmp_path / "a.gguf", model)
        assert (spec.window, spec.second_rope) == (None, None)

    def test_the_base_of_layers_with_a_window_has_a_default(self, tmp_path):
        model = build_transformers_model("gemma3_text", GEMMA3)
        write_gguf(tmp_path / "a.gguf", model, arch="gemma3", without=("rope.freq_base_swa",))
        second = load_model(tmp_path / "a.gguf")[0].second_rope
        assert second.frequencies[1] == pytest.approx(10000 ** (-1 / 8))

    @pytest.mark.parametrize(("layers", "size"), [(61, 16), (62, 12)])
    def test_the_largest_model_scales_scores_by_another_size(self, layers, size):
        values = {"block_count": layers, "embedding_length": 48, "context_length": 64, "feed_forward_length": 88}
        values |= {"attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-6}
        shapes = {"token_embd.weight": (97, 48), "blk.0.attn_q.weight": (64, 48)}
        metadata = {f"gemma3.{key}": value for key, value in values.items()}
        assert gguf_config(ARCHITECTURES["gemma3"], metadata, shapes, {}).query_pre_attn_scalar == size

    @pytest.mark.parametrize(
        ("keys", "words"),
        [
            ({"attention.sliding_window_pattern": [True, False, True]}, "it must be one number"),
            ({"final_logit_softcapping": 30.0}, r"gemma3\.final_logit_softcapping to 30\.0"),
            ({"attention.scale": 0.5}, r"gemma3\.attention\.scale to 0\.5"),
            ({"rope.freq_base_swa": "high"}, r"freq_base_swa as 'high'"),
            ({"rope.dimension_count": 8}, "rotated in part"),
        ],
    )
    def test_other_values_are_refused(self, tmp_path, keys, words):
        write_gguf(tmp_path / "a.gguf", build_transformers_model("gemma3_text", GEMMA3), arch="gemma3", keys=keys)
        with pytest.raises(UserError, match=words):
            load_model(tmp_path / "a.gguf")


def test_a_size_that_does_not_fit_is_refused(tmp_path):
    model = build_transformers_model("gemma3_text", GEMMA3)
    write_gguf(tmp_path / "a.gguf", model, arch="gemma3", keys={"embedding_length": 50})
    with pytest.raises(UserError, match=r"hidden size|has shape"):  # recent versions of transformers refuse the config
        load_model(tmp_path / "a.gguf")[1].load()


@pytest.mark.parametrize("arch", ["gemma2", "bamboo", "mistral"])
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
