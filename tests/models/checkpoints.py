"""Makes checkpoints for tests: edited copies of folders, GGUF files, and LoRA adapters."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shadowllm.models.decoder import Decoder
from shadowllm.models.registry import load_model

TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
}
GEMMA3_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
INTERLEAVED = ("llama", "granite", "smollm3")


def copied(source: Path, target: Path, **config) -> Path:
    """Copy a model folder with other values in its config; None is written as null."""
    shutil.copytree(source, target)
    edit_json(target / "config.json", **config)
    return target


def edit_json(path: Path, **changes) -> None:
    """Set keys of a JSON file. The file need not exist."""
    data = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(data | changes))


def rewrite(folder: Path, change) -> None:
    """Replace the tensors of a folder's model.safetensors by the result of ``change``."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def base_model(folder: Path):
    """The model of ``transformers`` in a folder, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def save_adapter(folder: Path, model: Path, **options) -> Path:
    """Save a random LoRA adapter of a model, and return its folder. No parameter keeps its initial value.

    Args:
        options: of peft's ``LoraConfig``.
    """
    import peft

    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    wrapped = peft.get_peft_model(base_model(model), peft.LoraConfig(**defaults | options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder)
    return folder


def write_gguf(
    path: Path, model, *, keys=None, kind=gguf.GGMLQuantizationType.F32, split=0, without=(), extra=None, arch="llama"
) -> None:
    """Write a model of ``transformers`` as llama.cpp's converter would, without a vocabulary and tables of RoPE.

    Args:
        keys: metadata beside the sizes: name (without the architecture, unless it has a dot in front) -> value.
        kind: type of the matrices.
        split: tensors of a file; 0 for one file.
        without: names of sizes to leave out.
        extra: more tensors by their GGUF names.
        arch: the name of the model's family in GGUF files.
    """
    config, writer = model.config, gguf.GGUFWriter(path, arch, split_max_tensors=split)
    for key, value in (_sizes(config, arch) | (keys or {})).items():
        if key not in without:
            add_key(writer, key.removeprefix(".") if key.startswith(".") else f"{arch}.{key}", value)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored, array = _stored(name, arch), tensor.numpy().astype(np.float32)
        if arch in INTERLEAVED and (part := stored.split(".")[-2]) in heads:
            array = _interleave(array, heads[part])
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        if array.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(stored, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(array))
    for name, (array, raw) in (extra or {}).items():
        writer.add_tensor(name, array, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _sizes(config, arch: str) -> dict:
    """The keys that the converter writes for the architecture."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    sizes = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    if arch.startswith("gemma"):
        sizes |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if arch == "gemma3":
        sizes |= _gemma3_keys(config, rope["full_attention"], rope["sliding_attention"])
    if arch == "phi3":
        sizes |= _phi3_keys(config, rope, head_dim)
    if arch == "granite":
        sizes |= {
            "attention.scale": config.attention_multiplier,
            "embedding_scale": config.embedding_multiplier,
            "residual_scale": config.residual_multiplier,
            "logit_scale": config.logits_scaling,
        }
    if not arch.startswith("gemma"):
        sizes = {"rope.dimension_count": head_dim, "rope.freq_base": rope["rope_theta"]} | sizes
    return sizes


def _gemma3_keys(config, rope: dict, window_rope: dict) -> dict:
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": rope.get("factor")}
    return {
        "attention.sliding_window": config.sliding_window,
        "rope.freq_base": rope["rope_theta"],
        "rope.freq_base_swa": window_rope["rope_theta"],
    } | (scaling if rope["rope_type"] == "linear" else {})


def _phi3_keys(config, rope: dict, head_dim: int) -> dict:
    trained = config.original_max_position_embeddings
    stretched = math.log(config.max_position_embeddings / trained) / math.log(trained)
    return {
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "rope.scaling.original_context_length": trained,
        "attention.sliding_window": config.sliding_window or 0,
    } | ({"rope.scaling.attn_factor": math.sqrt(1 + stretched)} if rope["rope_type"] == "longrope" else {})


def add_key(writer, key, value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_string(key, value)


def _stored(name: str, arch: str) -> str:
    tensors = TENSORS | GEMMA3_NORMS if arch == "gemma3" else TENSORS
    module, _, kind = name.rpartition(".")
    if module in tensors:
        return f"{tensors[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{tensors[part]}.{kind}"


def _interleave(array: np.ndarray, heads: int) -> np.ndarray:
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def logits(model, count: int = 40) -> torch.Tensor:
    """Of a model of ``transformers`` or a `Decoder` over the first tokens of a fixed random text."""
    vocab = (model.spec if hasattr(model, "spec") else model.config).vocab_size
    input_ids = torch.randint(0, vocab, (1, count), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        found = model(input_ids)
    return found.logits if hasattr(found, "logits") else found


def same_as_transformers(folder: Path) -> None:
    """Check that the decoder has the logits of ``transformers``, in float32."""
    spec, weights, _ = load_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(Decoder(spec, weights.load())), logits(theirs), atol=2e-5, rtol=0)
