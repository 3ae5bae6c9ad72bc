"""Compares every family with transformers: logits are equal within float32 noise."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM

from shadowllm.errors import UserError
from shadowllm.models.decoder import Decoder, KVCache
from shadowllm.models.registry import load_model
from shadowllm.models.spec import ModelSpec
from tests.conftest import FAMILIES, VARIANTS, build_transformers_model

# Long enough to show the full float32 noise; a dozen tokens may show less.
TEXT = (
    "The shadow of a model is a small network that says, token by token, which heads and neurons matter. "
    "What it leaves out is not read, so a step takes less time; what it keeps is computed as before, "
    "and the text goes on as if nothing had been left out."
)


def noise_bound(model, input_ids) -> tuple[torch.Tensor, float]:
    """Float64 logits of the model, and twice transformers' own float32 error plus a rounding floor."""
    with torch.no_grad():
        own = model(input_ids).logits
        # A new model, because one that was read from GGUF refuses to change its type.
        wide = type(model)(model.config).double().eval()
        wide.load_state_dict(model.state_dict())
        exact = wide(input_ids).logits
    floor = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    return exact, float(2 * (own - exact).abs().max() + floor)


@pytest.mark.parametrize("variant", VARIANTS | FAMILIES)
def test_logits_match_transformers(checkpoint, variant):
    spec, weights, _ = load_model(checkpoint(variant))
    input_ids = torch.randint(0, spec.vocab_size, (2, 33), generator=torch.Generator().manual_seed(1))
    exact, bound = noise_bound(AutoModelForCausalLM.from_pretrained(checkpoint(variant)), input_ids)
    with torch.no_grad():
        logits = Decoder(spec, weights.load())(input_ids)
    assert (logits - exact).abs().max() <= bound


@pytest.mark.parametrize(
    "variant", sorted((VARIANTS | FAMILIES).keys() - {"opt-350m"})
)  # its projections become tables
def test_parameter_count_matches_transformers(checkpoint, variant):
    spec, _, _ = load_model(checkpoint(variant))
    model = build_transformers_model(*(VARIANTS | FAMILIES)[variant])
    assert spec.n_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", ["llama-gqa", "opt", *FAMILIES])
def test_cached_steps_equal_the_whole_sequence(checkpoint, variant):
    spec, weights, _ = load_model(checkpoint(variant))
    decoder, cache = Decoder(spec, weights.load()), KVCache.empty(spec, batch=2, capacity=32)
    input_ids = torch.randint(0, spec.vocab_size, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = decoder(input_ids)
        first = decoder(input_ids[:, :7], cache=cache)
        steps = [decoder(input_ids[:, i : i + 1], torch.full((2, 1), i), cache) for i in range(7, 20)]
    torch.testing.assert_close(torch.cat([first, *steps], dim=1), whole, atol=2e-5, rtol=1e-5)


def test_smollm2_matches_transformers(smollm2):
    spec, weights, checkpoint = load_model(smollm2)
    assert (spec.n_layers, spec.n_heads, spec.n_kv_heads, spec.intermediate_size) == (30, 9, 3, 1536)
    input_ids = torch.tensor([checkpoint.tokenizer()(TEXT).input_ids])
    exact, bound = noise_bound(
        AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32), input_ids
    )
    with torch.no_grad():
        logits = Decoder(spec, weights.load())(input_ids)
    assert (logits - exact).abs().max() <= bound


def test_sharded_checkpoint_reads_like_one_file(checkpoint, tmp_path):
    whole = load_model(checkpoint("llama-gqa"))[1]
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama-gqa"))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    shards = load_model(tmp_path)[1]
    assert all(torch.equal(whole[name], shards[name]) for name in whole)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"word_embed_proj_dim": 24}, "lacks the tensor decoder.project_in.weight"),
        ({"layer_norm_elementwise_affine": False}, "LayerNorm weights"),
        ({"activation_function": "tanh"}, "activation 'tanh'"),
    ],
)
def test_opt_variants_refused_by_name(checkpoint, tmp_path, options, words):
    edit_config(checkpoint("opt"), tmp_path, options)
    with pytest.raises(UserError, match=words):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("variant", "options", "window", "layers"),
    [
        ("mistral", {"sliding_window": 16}, 16, (0, 1, 2)),
        ("mistral", {"sliding_window": 64}, None, ()),  # no text is longer
        ("mistral", {"sliding_window": None}, None, ()),
        ("llama-gqa", {"sliding_window": 16}, None, ()),  # Llama's code does not read it
        ("qwen2", {"max_window_layers": 2, "layer_types": None}, 5, (2,)),
        ("qwen2", {"max_window_layers": 3, "layer_types": None}, None, ()),
        ("qwen2", {"use_sliding_window": False, "layer_types": None}, None, ()),
        ("gemma3", {}, 8, (0, 2)),
    ],
)
def test_layers_with_a_sliding_window(checkpoint, tmp_path, variant, options, window, layers):
    edit_config(checkpoint(variant), tmp_path, options)
    stray = (
        pytest.warns(UserWarning, match="has sliding_window, which llama") if variant == "llama-gqa" else nullcontext()
    )
    with stray:
        spec = load_model(tmp_path)[0]
    assert (spec.window, spec.window_layers) == (window, layers)
    assert spec.max_seqlen == 64
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


GEMMA3 = FAMILIES["gemma3"][1]["rope_parameters"]
LONG = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
LONG |= {"original_max_position_embeddings": 16}


def in_windows(**changes):
    return {"rope_parameters": GEMMA3 | {"sliding_attention": GEMMA3["sliding_attention"] | changes}}


def rope(**changes):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0} | changes}


@pytest.mark.parametrize(
    ("variant", "options", "words"),
    [
        ("gemma3", in_windows(partial_rotary_factor=0.5), "partial_rotary_factor in layers with a window"),
        ("gemma3", in_windows(**LONG), "longrope in layers with a window"),
        ("gemma3", {"final_logit_softcapping": 0.0}, "final_logit_softcapping"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar in config.json is 0"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 numbers for 3 layers"),
        ("llama-gqa", rope(partial_rotary_factor="0.5"), "partial_rotary_factor must be a positive number"),
        ("llama-gqa", rope(partial_rotary_factor=float("inf")), "partial_rotary_factor must be a positive number"),
        ("llama-gqa", rope(**LONG | {"original_max_position_embeddings": "abc"}), "original_max_position_embeddings"),
        ("llama-gqa", rope(rope_type=["linear"], factor=2.0), "is not supported"),
        ("granite", {"embedding_multiplier": 1e200}, "embedding factor is 1e"),
    ],
)
def test_options_that_change_the_model_are_refused(checkpoint, tmp_path, variant, options, words):
    edit_config(checkpoint(variant), tmp_path, options)
    with pytest.raises(UserError, match=words):
        load_model(tmp_path)


def test_more_numbers_than_layers_are_cut(checkpoint, tmp_path):
    edit_config(checkpoint("smollm3"), tmp_path, {"no_rope_layers": [1, 0, 1, 0, 1]})
    assert load_model(tmp_path)[0].second_rope_layers == (1,)


@pytest.mark.parametrize(("window", "words"), [(0, "window of 0 positions"), (None, "and no sliding_window")])
def test_a_sliding_window_without_positions_is_refused(checkpoint, tmp_path, window, words):
    edit_config(checkpoint("gemma3"), tmp_path, {"sliding_window": window})
    with pytest.raises(UserError, match=words):
        load_model(tmp_path)


def test_a_description_without_windows_is_readable(checkpoint):
    """Bundles of version 0.2 and earlier have none."""
    spec = load_model(checkpoint("llama-gqa"))[0]
    old = {name: value for name, value in spec.to_dict().items() if not name.startswith("window")}
    assert ModelSpec.from_dict(old) == spec


def test_layers_of_an_unknown_kind_are_refused(checkpoint, tmp_path):
    edit_config(checkpoint("qwen3"), tmp_path, {"layer_types": ["chunked_attention"] * 3})
    with pytest.raises(UserError, match="chunked_attention"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "RoPE scaling 'proportional'"),
        ({"model_type": "gpt2"}, "'gpt2' is not supported"),
        ({"num_key_value_heads": 3}, "do not divide"),
        ({"intermediate_size": 77}, "has shape"),
    ],
)
def test_llama_variants_refused_by_name(checkpoint, tmp_path, options, words):
    edit_config(checkpoint("llama-mha"), tmp_path, options)
    with pytest.raises(UserError, match=words):
        load_model(tmp_path)[1].load()


def edit_config(source, target, options):
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | options))


class TestDamagedFiles:
    def test_no_such_model(self):
        with pytest.raises(UserError, match="no such model"):
            load_model("/nowhere/at/all")

    def test_folder_without_weights(self, tmp_path):
        with pytest.raises(UserError, match="no model weights"):
            load_model(tmp_path)

    def test_truncated_safetensors(self, checkpoint, tmp_path):
        edit_config(checkpoint("opt"), tmp_path, {})
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(UserError, match="damaged or truncated"):
            load_model(tmp_path)

    def test_truncated_gguf(self, smollm2, tmp_path):
        path = tmp_path / "model.gguf"
        with smollm2.open("rb") as file:
            path.write_bytes(file.read(3_000_000))
        with pytest.raises(UserError, match=r"damaged|cannot read"):
            load_model(path)

    def test_missing_shard(self, checkpoint, tmp_path):
        AutoModelForCausalLM.from_pretrained(checkpoint("llama-gqa")).save_pretrained(tmp_path, max_shard_size="40KB")
        next(tmp_path.glob("*.safetensors")).unlink()
        with pytest.raises(UserError, match="is missing"):
            load_model(tmp_path)
