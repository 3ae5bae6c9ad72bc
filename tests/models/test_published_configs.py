"""The configurations of sparse models as they are published: which family they are, and what is read from them."""

from __future__ import annotations

import json

import pytest
import torch

from shadowllm.errors import UserError
from shadowllm.evaluation.transformers_check import compare_with_transformers
from shadowllm.models.decoder import Decoder
from shadowllm.models.files.config import read_config
from shadowllm.models.registry import load_model
from tests.bundles import make_bundle
from tests.conftest import GROUPED, MULTIPLIERS, build_transformers_model
from tests.models.checkpoints import logits

MINICPM = {"model_type": "minicpm", "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 6}


def published(model, folder, **changes):
    """Save a model with another config, in the spelling of older versions of transformers."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": theta, "rope_scaling": None} | changes))
    return folder


def test_relullama_is_a_llama_with_relu(tmp_path):
    model = build_transformers_model("llama", {"hidden_act": "relu"})
    spec, weights, _ = load_model(published(model, tmp_path, architectures=["LlamaForCausalLM"]))
    assert (spec.family, spec.activation) == ("llama", "relu")
    torch.testing.assert_close(logits(Decoder(spec, weights.load())), logits(model), atol=2e-5, rtol=0)


def test_a_config_of_prosparse_is_read_as_llamas(tmp_path):
    model = build_transformers_model("llama", {"hidden_act": "relu"})
    code = {"AutoConfig": "configuration_sparsellama.SparseLlamaConfig"}
    names = {"architectures": ["SparseLlamaForCausalLM"], "model_type": "sparsellama", "auto_map": code}
    spec, weights, checkpoint = load_model(published(model, tmp_path, **names))
    assert spec.family == "sparsellama"
    torch.testing.assert_close(logits(Decoder(spec, weights.load())), logits(model), atol=2e-5, rtol=0)
    assert "no code for sparsellama" in compare_with_transformers(checkpoint, weights)["skipped"]


OLD_CODE = """
from transformers import LlamaConfig
class SparseLlamaConfig(LlamaConfig):
    model_type = "sparsellama"
    def __getattribute__(self, name):
        if name in ("attention_bias", "mlp_bias"):
            raise AttributeError(name)
        return super().__getattribute__(name)
"""


def test_a_config_class_of_its_own_that_is_older_than_the_biases(tmp_path):
    model = build_transformers_model("llama", {"hidden_act": "relu"})
    code = {"AutoConfig": "configuration_sparsellama.SparseLlamaConfig"}
    folder = published(model, tmp_path, model_type="sparsellama", auto_map=code)
    (folder / "configuration_sparsellama.py").write_text(OLD_CODE)
    spec, *_ = load_model(folder, trust_remote_code=True)
    assert (spec.family, spec.mlp_bias, spec.qkv_bias) == ("sparsellama", False, False)


def test_turbosparse_is_a_mistral_with_a_relu_of_gate_and_of_up(tmp_path):
    model = build_transformers_model("mistral", GROUPED | {"hidden_act": "relu"})
    names = {"architectures": ["BambooForCausalLM"], "model_type": "bamboo"}
    spec, weights, _ = load_model(published(model, tmp_path, **names))
    assert (spec.family, spec.activation) == ("bamboo", "drelu")
    for layer in model.model.layers:
        layer.mlp.up_proj = torch.nn.Sequential(layer.mlp.up_proj, torch.nn.ReLU())
    torch.testing.assert_close(logits(Decoder(spec, weights.load())), logits(model), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("act", "words"), [("silu", "says 'silu'"), ("fatrelu", "says 'fatrelu'"), (None, "does not give it")]
)
def test_turbosparse_with_another_activation_is_refused(tmp_path, act, words):
    """Its code applies the activation to gate and to up, which is dReLU only if it is ReLU."""
    folder = published(build_transformers_model("mistral", GROUPED), tmp_path, model_type="bamboo", hidden_act=act)
    if act is None:
        config = json.loads((folder / "config.json").read_text())
        del config["hidden_act"]
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"Bamboo needs the activation 'relu' .*{words}"):
        load_model(folder)
    assert load_model(folder, activation="relu")[0].activation == "drelu"


def test_minicpm_has_granites_factors(tmp_path):
    """Granite has the same equations, and transformers has code for it."""
    factors = MULTIPLIERS | {"residual_multiplier": 1.4 / 3**0.5, "attention_multiplier": 12**-0.5}
    model = build_transformers_model("granite", GROUPED | factors | {"tie_word_embeddings": True})
    names = {"architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm", "scale_emb": 12, "scale_depth": 1.4}
    folder = published(model, tmp_path, dim_model_base=6, **names)
    spec, weights, _ = load_model(folder)
    assert spec.family == "minicpm"
    torch.testing.assert_close(logits(Decoder(spec, weights.load())), logits(model), atol=5e-5, rtol=0)
    (tmp_path / "out").mkdir()
    make_bundle(folder, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["model_type"], written["scale_emb"]) == ("minicpm", 12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale_emb": None}, "needs scale_emb"),
        ({"scale_emb": 1e200}, "embedding factor is 1e"),
        ({"scale_depth": -1.0}, "scale_depth is -1"),
        ({"scale_depth": "1.4"}, "scale_depth is '1.4'"),
        ({"dim_model_base": [6]}, "dim_model_base is"),
    ],
)
def test_factors_of_minicpm_that_are_not_usable(tmp_path, changes, words):
    folder = published(build_transformers_model("llama", {}), tmp_path, **MINICPM | changes)
    with pytest.raises(UserError, match=words):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sparse_config": {"kernel_size": 32, "dense_len": 8192}}, "sparse_config.*remove it"),
        ({"num_experts": 8, "num_experts_per_tok": 2}, "num_experts"),
        ({"use_mup": False}, "use_mup"),
        ({"qk_norm": True}, "qk_norm"),
        ({"kv_channels": 128}, "128 dimensions .kv_channels"),
    ],
)
def test_variants_of_minicpm_that_are_refused(tmp_path, changes, words):
    folder = published(build_transformers_model("llama", {}), tmp_path, **MINICPM | changes)
    with pytest.raises(UserError, match=words):
        load_model(folder)


def test_keys_of_minicpm_that_change_nothing(tmp_path):
    model = build_transformers_model("llama", {})
    size = model.config.hidden_size // model.config.num_attention_heads
    keys = {"sparse_config": None, "num_experts": 0, "use_mup": True, "qk_norm": False, "kv_channels": size}
    assert load_model(published(model, tmp_path, **MINICPM | keys))[0].family == "minicpm"


def test_minicpm_ties_its_embeddings_unless_the_config_says_otherwise(tmp_path):
    """The default of its class is true, that of Llama is false."""
    model = build_transformers_model("llama", {})
    for stated, tied in ((None, True), (True, True), (False, False)):
        folder = published(model, tmp_path / str(stated), **MINICPM)
        config = json.loads((folder / "config.json").read_text())
        config["tie_word_embeddings"] = stated
        if stated is None:
            del config["tie_word_embeddings"]
        (folder / "config.json").write_text(json.dumps(config))
        assert read_config(folder, trust_remote_code=False).tie_word_embeddings is tied
