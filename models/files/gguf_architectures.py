"""The architectures of GGUF files that are read, and how their files differ.

llama.cpp defines them: its converter writes the keys and changes some weights, and its loader says what they mean.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from shadowllm.errors import UserError
from shadowllm.models.files.gguf_keys import Keys
from shadowllm.models.files.gguf_rope import (
    FACTORS,
    LONG_FACTORS,
    SHORT_FACTORS,
    Tables,
    long_rope,
    one_rope,
    trained_context,
    two_ropes,
)

# Hugging Face names of the modules in a layer. The gguf package maps them to GGUF names.
NORMS = ("input_layernorm", "post_attention_layernorm")
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
MLP_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
FUSED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")

WINDOW, PERIOD = "attention.sliding_window", "attention.sliding_window_pattern"
# One layer of so many has no window, in Gemma 3, or no RoPE, in SmolLM3. GGUF files need not or do not say it.
GEMMA3_PERIOD, SMOLLM3_PERIOD = 6, 4
# The layers of Gemma 3 27B, by which llama.cpp knows that it scales attention scores by another size.
GEMMA3_27B_LAYERS = 62


@dataclass(frozen=True)
class Architecture:
    """What GGUF files of one architecture hold.

    Attributes:
        name: its name in the files.
        family: ``model_type`` of the same models in config.json.
        model_class: their class in ``transformers``.
        layer: Hugging Face names of the modules in a layer.
        biases: GGUF names of the projections of attention that have a bias.
        optional_biases: all of them can be absent, and the projections of the MLP can have biases too.
        interleaved: the rows of q and k are stored with the two halves of each rotated head interleaved.
        partial_rotary: a part of each head can be rotated.
        norm_shift: what the converter adds to the weights of norms.
        tables: tensors of factors of RoPE that a file can have.
        keys: keys that are read, beside those of every architecture.
        rope: reads the RoPE parameters, from the keys, the head size and the tables.
        options: reads what else the config has, from the keys and the head size.
    """

    name: str
    family: str
    model_class: str
    layer: tuple[str, ...] = (*NORMS, *ATTENTION, *MLP)
    biases: tuple[str, ...] = ()
    optional_biases: bool = False
    interleaved: bool = False
    partial_rotary: bool = False
    norm_shift: float = 0.0
    tables: tuple[str, ...] = (FACTORS,)
    keys: tuple[str, ...] = ()
    rope: Callable[[Keys, int, Tables], dict[str, Any]] = one_rope
    options: Callable[[Keys, int], dict[str, Any]] = lambda _keys, _head_dim: {}


def read_architecture(metadata: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a GGUF file.

    Raises:
        UserError: the file holds no model, or one of another architecture.
    """
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise UserError(
            f"the GGUF file holds no model but something of the type {kind!r}", "name the file of the model"
        )
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(
            f"the GGUF file holds a model of the family {name!r}, which is not supported",
            f"use a GGUF file of {', '.join(ARCHITECTURES)}, or the safetensors checkpoint of a supported family",
        )
    return ARCHITECTURES[name]


def _gemma3(keys: Keys, head_dim: int) -> dict[str, Any]:
    layers, window, period = keys.size("block_count"), _window(keys), keys.size(PERIOD, GEMMA3_PERIOD)
    heads, hidden = keys.size("attention.head_count"), keys.size("embedding_length")
    windows = [window is not None and (layer + 1) % period != 0 for layer in range(layers)]
    return {
        "sliding_window": window,
        "layer_types": ["sliding_attention" if has_window else "full_attention" for has_window in windows],
        "query_pre_attn_scalar": hidden // heads if layers == GEMMA3_27B_LAYERS else head_dim,
    }


def _granite(keys: Keys, head_dim: int) -> dict[str, Any]:
    # llama.cpp uses this key as a switch, in this architecture only.
    if keys.get("rope.scaling.finetuned") is False:
        raise UserError("the GGUF file holds a Granite model without RoPE", "use one that rotates its heads")
    return {
        "embedding_multiplier": keys.factor("embedding_scale", 1.0),
        "residual_multiplier": keys.factor("residual_scale", 1.0),
        "attention_multiplier": keys.factor("attention.scale", 1 / math.sqrt(head_dim)),
        "logits_scaling": keys.factor("logit_scale"),
    }


def _phi3(keys: Keys, head_dim: int) -> dict[str, Any]:
    if keys.get(WINDOW) is None:
        warnings.warn(
            f"the GGUF file has no {keys.prefix}{WINDOW}, as those from before July 2024: if the model has a sliding "
            "window, longer texts are not computed as they should be",
            stacklevel=4,
        )
    return {
        "sliding_window": _window(keys),
        "original_max_position_embeddings": trained_context(keys),
        # transformers 5.0 reads it here, and later versions among the RoPE parameters.
        "partial_rotary_factor": keys.size("rope.dimension_count", head_dim) / head_dim,
    }


def _smollm3(keys: Keys, head_dim: int) -> dict[str, Any]:
    return {"no_rope_layer_interval": SMOLLM3_PERIOD}


def _window(keys: Keys) -> int | None:
    """Return the sliding window; None if there is none, which a file can state as 0."""
    return None if keys.get(WINDOW) in (None, 0) else keys.size(WINDOW)


_LLAMA = Architecture(
    "llama",
    "llama",
    "LlamaForCausalLM",
    biases=("attn_q", "attn_k", "attn_v", "attn_output"),
    optional_biases=True,
    interleaved=True,
)
_ALL = (
    Architecture("gemma", "gemma", "GemmaForCausalLM", norm_shift=1.0, tables=()),
    Architecture(
        "gemma3",
        "gemma3_text",
        "Gemma3ForCausalLM",
        layer=(*NORMS, *ATTENTION, *HEAD_NORMS, *MLP, *MLP_NORMS),
        norm_shift=1.0,
        tables=(),
        keys=(WINDOW, PERIOD, "rope.freq_base_swa"),
        rope=two_ropes,
        options=_gemma3,
    ),
    replace(
        _LLAMA,
        name="granite",
        family="granite",
        model_class="GraniteForCausalLM",
        keys=("embedding_scale", "residual_scale", "attention.scale", "logit_scale"),
        options=_granite,
    ),
    _LLAMA,
    Architecture(
        "phi3",
        "phi3",
        "Phi3ForCausalLM",
        layer=(*NORMS, *FUSED),
        partial_rotary=True,
        tables=(LONG_FACTORS, SHORT_FACTORS),
        keys=(WINDOW, "rope.scaling.attn_factor"),
        rope=long_rope,
        options=_phi3,
    ),
    Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", biases=("attn_q", "attn_k", "attn_v")),
    Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", layer=(*NORMS, *ATTENTION, *HEAD_NORMS, *MLP)),
    replace(_LLAMA, name="smollm3", family="smollm3", model_class="SmolLM3ForCausalLM", options=_smollm3),
)
ARCHITECTURES = {architecture.name: architecture for architecture in _ALL}
